"""Single-cell models of scvi-tools: count likelihoods, labels, proteins and open chromatin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.real.case import Falls, Model, Run
from benchmarks.real.plain import SILENT

CELLS, GENES, KINDS, PROTEINS = 400, 100, 4, 8


def counts(seed: int) -> Any:
    """Return cells of four kinds in two batches, with counts of genes and of proteins."""
    import anndata

    rng = np.random.default_rng(seed)
    kind = rng.integers(KINDS, size=CELLS)
    batch = rng.integers(2, size=CELLS)
    programs = rng.gamma(0.6, 1.0, size=(KINDS, GENES)) + 0.02
    shift = np.exp(0.3 * rng.normal(size=(2, GENES)))
    depth = np.exp(rng.normal(6, 0.4, size=(CELLS, 1)))
    mean = programs[kind] * shift[batch]
    mean = depth * mean / mean.sum(1, keepdims=True)
    cells = anndata.AnnData(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32))
    cells.obs["batch"] = [str(b) for b in batch]
    cells.obs["kind"] = [f"kind {k}" if rng.random() < 0.6 else "unknown" for k in kind]
    surface = rng.gamma(1.0, 20.0, size=(KINDS, PROTEINS)) + 1
    cells.obsm["proteins"] = rng.poisson(surface[kind] + 3).astype(np.float32)
    return cells


def of_scvi(
    name: str,
    epochs: int = 40,
    setup: dict[str, Any] | None = None,
    layers: dict[str, Any] | None = None,
    train_size: float = 1.0,
    **arguments: Any,
) -> Callable[[int], Run]:
    """Return a builder of a model of scvi-tools.

    Args:
        name: Name of its class in ``scvi.model``.
        epochs: Epochs of four steps.
        setup: Arguments of ``setup_anndata``.
        layers: Arguments of the model.
        train_size: Share of the cells to train on.
        **arguments: Further arguments of ``train``.
    """

    def build(seed: int) -> Run:
        import scvi

        scvi.settings.seed = seed
        cells = counts(seed)
        if name == "PEAKVI":
            cells.X = (cells.X > 2).astype(np.float32)
        kind = getattr(scvi.model, name)
        kind.setup_anndata(cells, **(setup or {"batch_key": "batch"}))
        model = kind(cells, **(layers or {}))

        def fit(callbacks: Sequence[Any]) -> None:
            silent = {key: value for key, value in SILENT.items() if key != "num_sanity_val_steps"}
            model.train(
                max_epochs=epochs,
                batch_size=100,
                train_size=train_size,
                callbacks=[*callbacks],
                early_stopping=False,
                plan_kwargs={"n_epochs_kl_warmup": 20},
                **silent,
                **arguments,
            )

        return Run(fit)

    return build


SMALL = {"n_hidden": 48, "n_latent": 8}

HEALTHY = (
    Model(
        "scvi",
        "scVI, zero-inflated counts",
        "scvi-tools",
        "single cell",
        of_scvi("SCVI", layers=SMALL),
        learned=Falls(0.9),
        order=(
            "*z_encoder.encoder.*.0.weight",
            "*z_encoder.mean_encoder.weight",
            "*decoder.px_decoder.*.0.weight",
            "*decoder.px_scale_decoder.0.weight",
        ),
    ),
    Model(
        "scvi-nb",
        "scVI, two layers, negative binomial counts",
        "scvi-tools",
        "single cell",
        of_scvi("SCVI", layers=SMALL | {"n_layers": 2, "gene_likelihood": "nb", "dispersion": "gene-cell"}),
        learned=Falls(0.9),
        order=(
            "*z_encoder.encoder.*.0.weight",
            "*z_encoder.mean_encoder.weight",
            "*decoder.px_scale_decoder.0.weight",
        ),
    ),
    Model(
        "linear-scvi",
        "scVI with a linear decoder",
        "scvi-tools",
        "single cell",
        of_scvi("LinearSCVI", layers=SMALL),
        learned=Falls(0.9),
        order=("*z_encoder.mean_encoder.weight", "*factor_regressor*weight"),
    ),
    Model(
        "scanvi",
        "scANVI, some labels known",
        "scvi-tools",
        "single cell",
        of_scvi(
            "SCANVI",
            setup={"batch_key": "batch", "labels_key": "kind", "unlabeled_category": "unknown"},
            layers=SMALL,
        ),
        learned=Falls(0.9),
        order=(
            "*module.z_encoder.encoder.*.0.weight",
            "*module.z_encoder.mean_encoder.weight",
            "*encoder_z2_z1.mean_encoder.weight",
        ),
    ),
    Model(
        "totalvi",
        "totalVI, genes and proteins, with an adversary",
        "scvi-tools",
        "single cell",
        of_scvi(
            "TOTALVI",
            setup={"batch_key": "batch", "protein_expression_obsm_key": "proteins"},
            layers={"latent_distribution": "normal"},
            train_size=0.9,
            reduce_lr_on_plateau=False,
            adversarial_classifier=True,
        ),
        learned=Falls(0.9),
        order=(
            "module.encoder.encoder.fc_layers.Layer 0.0.weight",
            "module.encoder.encoder.fc_layers.Layer 1.0.weight",
            "module.encoder.z_mean_encoder.weight",
            "module.decoder.px_decoder.fc_layers.Layer 0.0.weight",
            "module.decoder.px_scale_decoder.*weight",
        ),
    ),
    Model(
        "peakvi",
        "PeakVI, open chromatin",
        "scvi-tools",
        "single cell",
        of_scvi("PEAKVI", layers=SMALL),
        learned=Falls(0.9),
        order=(
            "module.z_encoder.encoder.fc_layers.Layer 0.0.weight",
            "module.z_encoder.mean_encoder.weight",
            "module.z_decoder.px_decoder.fc_layers.Layer 0.0.weight",
            "module.z_decoder.output.0.weight",
        ),
    ),
)

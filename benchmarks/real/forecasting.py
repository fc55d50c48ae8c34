"""Forecasting: pytorch-forecasting, neuralforecast and darts, each with a Trainer or LightningModule of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.real.case import Falls, FallsBy, Model, Run
from benchmarks.real.plain import SILENT, train

SERIES, POINTS, PAST, AHEAD = 12, 120, 24, 6
#: Names of further columns: known beforehand.
KNOWN = ("price", "week")


def waves(seed: int, *, scale: float = 1.0) -> Any:
    """Return a table of waves with a trend, a known price that lowers them, and noise."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    frames = []
    for number in range(SERIES):
        time = np.arange(POINTS)
        period, phase = 12, rng.uniform(0, 2 * np.pi)
        price = rng.normal(size=POINTS)
        wave = 10 + 3 * np.sin(2 * np.pi * time / period + phase) + 0.02 * time - price
        frames.append(
            pd.DataFrame(
                {
                    "series": str(number),
                    "region": "north" if number % 2 else "south",
                    "time": time,
                    "week": (time % period).astype(str),
                    "price": price,
                    "value": scale * (wave + 0.3 * rng.normal(size=POINTS)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _dataset(table: Any, **arguments: Any) -> Any:
    from pytorch_forecasting import TimeSeriesDataSet

    return TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=PAST,
        max_prediction_length=AHEAD,
        time_varying_unknown_reals=["value"],
        **arguments,
    )


def temporal_fusion(covariates: bool, steps: int = 150, scale: float | None = None) -> Callable[[int], Run]:
    """Return a builder of pytorch-forecasting's temporal fusion transformer.

    Args:
        covariates: Give it a region, a week and a price, too; else only the series itself.
        steps: Optimizer steps.
        scale: Factor on the series, which are not normalized then.
    """

    def build(seed: int) -> Run:
        from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer

        more: dict[str, Any] = {}
        if covariates:
            more = {
                "static_categoricals": ["region"],
                "time_varying_known_categoricals": ["week"],
                "time_varying_known_reals": ["price"],
                "add_relative_time_idx": True,
                "add_target_scales": True,
            }
        if scale is not None:
            from pytorch_forecasting.data import EncoderNormalizer

            more["target_normalizer"] = EncoderNormalizer(method="identity")
        data = _dataset(waves(seed, scale=1.0 if scale is None else scale), **more)
        net = TemporalFusionTransformer.from_dataset(
            data,
            learning_rate=0.01,
            hidden_size=16,
            attention_head_size=2,
            hidden_continuous_size=8,
            dropout=0.1,
            loss=QuantileLoss(),
            optimizer="adam",
            log_interval=-1,
        )
        loader = data.to_dataloader(train=True, batch_size=64, num_workers=0)
        return train(net, loader, steps, gradient_clip_val=0.1)

    return build


def deepar(seed: int, steps: int = 200) -> Run:
    """Return a recurrent net that predicts a distribution."""
    from pytorch_forecasting import DeepAR
    from pytorch_forecasting.metrics import NormalDistributionLoss

    data = _dataset(waves(seed), static_categoricals=["region"])
    net = DeepAR.from_dataset(
        data,
        learning_rate=0.01,
        hidden_size=24,
        rnn_layers=2,
        dropout=0.1,
        loss=NormalDistributionLoss(),
        optimizer="adam",
        log_interval=-1,
    )
    return train(net, data.to_dataloader(train=True, batch_size=64, num_workers=0), steps)


def nbeats(seed: int, steps: int = 400) -> Run:
    """Return pytorch-forecasting's N-BEATS."""
    from pytorch_forecasting import NBeats

    data = _dataset(
        waves(seed), min_encoder_length=PAST, min_prediction_length=AHEAD, add_relative_time_idx=False
    )
    net = NBeats.from_dataset(
        data,
        learning_rate=3e-3,
        widths=[32, 128],
        num_blocks=[2, 2],
        num_block_layers=[2, 2],
        optimizer="adam",
        log_interval=-1,
        log_val_interval=-1,
    )
    return train(net, data.to_dataloader(train=True, batch_size=64, num_workers=0), steps)


def nhits(seed: int, steps: int = 200) -> Run:
    """Return pytorch-forecasting's N-HiTS."""
    from pytorch_forecasting import NHiTS
    from pytorch_forecasting.metrics import MAE

    data = _dataset(
        waves(seed),
        min_encoder_length=PAST,
        min_prediction_length=AHEAD,
        time_varying_known_reals=["price"],
        static_categoricals=["region"],
    )
    net = NHiTS.from_dataset(
        data, learning_rate=3e-3, hidden_size=48, loss=MAE(), optimizer="adam", log_interval=-1
    )
    return train(net, data.to_dataloader(train=True, batch_size=64, num_workers=0), steps)


def of_nixtla(
    name: str, steps: int = 200, covariates: bool = False, **arguments: Any
) -> Callable[[int], Run]:
    """Return a builder of a model of neuralforecast, by the name of its class."""

    def build(seed: int) -> Run:
        import pandas as pd
        from neuralforecast import NeuralForecast, models

        table = waves(seed)
        table = table.rename(columns={"series": "unique_id", "value": "y"})
        table["ds"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(table["time"], unit="D")
        known = ["price"] if covariates else []
        columns = table[["unique_id", "ds", "y", *known]]

        def fit(callbacks: Sequence[Any]) -> None:
            own = {"futr_exog_list": known} if known else {}
            for callback in callbacks:  # the package trains copies of its models, whose callbacks we must see
                callback.__deepcopy__ = lambda memo, same=callback: same
            model = getattr(models, name)(
                h=AHEAD,
                input_size=PAST,
                max_steps=steps,
                batch_size=8,
                windows_batch_size=64,
                scaler_type="standard",
                random_seed=seed + 1,
                callbacks=[*callbacks],
                **own,
                **SILENT,
                **arguments,
            )
            NeuralForecast(models=[model], freq="D").fit(df=columns, val_size=0)

        return Run(fit)

    return build


def of_darts(name: str, epochs: int = 12, **arguments: Any) -> Callable[[int], Run]:
    """Return a builder of a model of darts, by the name of its class."""

    def build(seed: int) -> Run:
        from darts import TimeSeries, models

        table = waves(seed)
        groups = [part["value"].to_numpy() for _, part in table.groupby("series")]
        series = [TimeSeries.from_values(((v - v.mean()) / v.std()).astype(np.float32)) for v in groups]

        def fit(callbacks: Sequence[Any]) -> None:
            model = getattr(models, name)(
                input_chunk_length=PAST,
                **({} if name == "RNNModel" else {"output_chunk_length": AHEAD}),
                batch_size=64,
                n_epochs=epochs,
                random_state=seed,
                pl_trainer_kwargs={**SILENT, "callbacks": [*callbacks]},
                **arguments,
            )
            model.fit(series, verbose=False)

        return Run(fit)

    return build


HEALTHY = (
    Model(
        "tft",
        "Temporal fusion transformer, with covariates",
        "pytorch-forecasting",
        "forecasting",
        temporal_fusion(True),
        learned=Falls(0.5),
        order=("*lstm_encoder.weight_ih_l0", "*output_layer.weight"),
    ),
    Model(
        "tft-alone",
        "Temporal fusion transformer, the series alone",
        "pytorch-forecasting",
        "forecasting",
        temporal_fusion(False),
        learned=Falls(0.5),
        order=("*lstm_encoder.weight_ih_l0", "*output_layer.weight"),
    ),
    Model(
        "deepar",
        "DeepAR, likelihood of a normal distribution",
        "pytorch-forecasting",
        "forecasting",
        deepar,
        learned=Falls(0.75),
        order=("*rnn.weight_ih_l0", "*distribution_projector.weight"),
    ),
    Model(
        "nbeats",
        "N-BEATS",
        "pytorch-forecasting",
        "forecasting",
        nbeats,
        learned=Falls(0.7),
        order=(
            "net_blocks.0.fc.0.weight",
            "net_blocks.0.theta_f_fc.weight",
            "net_blocks.1.fc.0.weight",
            "net_blocks.3.theta_f_fc.weight",
        ),
    ),
    Model(
        "pf-nhits",
        "N-HiTS with covariates",
        "pytorch-forecasting",
        "forecasting",
        nhits,
        learned=Falls(0.5),
        order=(
            "model.blocks.0.layers.layers.0.weight",
            "model.blocks.0.layers.layers.4.weight",
            "model.blocks.1.layers.layers.0.weight",
            "model.blocks.2.layers.layers.4.weight",
        ),
    ),
    Model(
        "nf-lstm",
        "Recurrent net",
        "neuralforecast",
        "forecasting",
        of_nixtla("LSTM", encoder_hidden_size=24, decoder_hidden_size=24),
        learned=Falls(0.7),
        order=(
            "hist_encoder.weight_ih_l0",
            "hist_encoder.weight_ih_l1",
            "mlp_decoder.layers.0.weight",
            "mlp_decoder.layers.3.weight",
        ),
    ),
    Model(
        "nf-deepar",
        "DeepAR, Student's t",
        "neuralforecast",
        "forecasting",
        of_nixtla("DeepAR", lstm_hidden_size=24, lstm_n_layers=1),
        learned=FallsBy(0.3),
        order=(
            "hist_encoder.weight_ih_l0",
            "decoder.layers.0.weight",
        ),
    ),
    Model(
        "nf-tft",
        "Temporal fusion transformer, the series alone",
        "neuralforecast",
        "forecasting",
        of_nixtla("TFT", hidden_size=16, n_head=2),
        learned=Falls(0.6),
        order=(
            "*history_vsn.var_grns.0.lin_a.weight",
            "*history_encoder.weight_ih_l0",
            "*attention.qkv_linears.weight",
            "*positionwise_grn.lin_a.weight",
            "output_adapter.weight",
        ),
    ),
    Model(
        "nf-tft-known",
        "Temporal fusion transformer, with a known price",
        "neuralforecast",
        "forecasting",
        of_nixtla("TFT", covariates=True, hidden_size=16, n_head=2),
        learned=Falls(0.6),
        order=(
            "*history_vsn.var_grns.0.lin_a.weight",
            "*history_encoder.weight_ih_l0",
            "*attention.qkv_linears.weight",
            "*positionwise_grn.lin_a.weight",
            "output_adapter.weight",
        ),
    ),
    Model(
        "nhits",
        "N-HiTS",
        "neuralforecast",
        "forecasting",
        of_nixtla("NHITS", mlp_units=[[64, 64]] * 3),
        learned=Falls(0.6),
        order=(
            "blocks.0.layers.0.weight",
            "blocks.0.layers.7.weight",
            "blocks.1.layers.0.weight",
            "blocks.2.layers.7.weight",
        ),
    ),
    Model(
        "patchtst",
        "PatchTST",
        "neuralforecast",
        "forecasting",
        of_nixtla("PatchTST", hidden_size=32, n_heads=4, encoder_layers=2, patch_len=6, stride=3),
        learned=Falls(0.6),
        order=(
            "*W_P.weight",
            "*layers.0.self_attn.W_Q.weight",
            "*layers.0.ff.3.weight",
            "*layers.1.self_attn.W_Q.weight",
            "*head.linear.weight",
        ),
    ),
    Model(
        "darts-tft",
        "Temporal fusion transformer",
        "darts",
        "forecasting",
        of_darts("TFTModel", 12, hidden_size=16, num_attention_heads=2, add_relative_index=True),
        learned=Falls(0.6),
        order=(
            "encoder_vsn.single_variable_grns.target_0.fc1.weight",
            "lstm_encoder.weight_ih_l0",
            "static_enrichment_grn.fc1.weight",
            "output_layer.weight",
        ),
    ),
    Model(
        "tcn",
        "Temporal convolutions",
        "darts",
        "forecasting",
        of_darts("TCNModel", 12, num_filters=8, num_layers=3),
        learned=Falls(0.6),
        order=(
            "res_blocks.0.conv1.weight",
            "res_blocks.0.conv2.weight",
            "res_blocks.1.conv1.weight",
            "res_blocks.2.conv2.weight",
        ),
    ),
    Model(
        "tide",
        "TiDE",
        "darts",
        "forecasting",
        of_darts("TiDEModel", 12, hidden_size=32),
        learned=Falls(0.6),
        order=(
            "encoders.0.dense.0.weight",
            "decoders.0.dense.0.weight",
            "temporal_decoder.dense.0.weight",
        ),
    ),
    Model(
        "rnn",
        "Recurrent net",
        "darts",
        "forecasting",
        of_darts("RNNModel", 12, model="LSTM", training_length=36),
        learned=Falls(0.6),
        order=(
            "rnn.weight_ih_l0",
            "V.weight",
        ),
    ),
)

"""Guard the Trainer of Hugging Face's transformers with a TrainerCallback.

pip install transformers accelerate && python examples/hugging_face.py
"""

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_gradguard import GradientHalt, Guard, Policy, SteadyClip


class GuardCallback(TrainerCallback):
    """Judge each step between its gradients and the optimizer; use it with ``max_grad_norm=0``."""

    def __init__(self, **options):
        self.options, self.guard, self.halt = options, None, None

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if self.guard is None:
            # Accelerate wraps the optimizer; the guard needs the one inside.
            inner = getattr(optimizer, "optimizer", optimizer)
            self.guard = Guard(model.named_parameters(), optimizer=inner, **self.options)
        try:
            # The Trainer passes no loss here, so rules that need it are off. Gradients of a bad step are removed.
            self.guard.step(step=state.global_step)
        except GradientHalt as halt:
            self.halt = halt
            model.zero_grad()
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.halt is not None:
            raise self.halt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x, labels):
        scores = self.net(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Points(Dataset):
    def __len__(self):
        return 320

    def __getitem__(self, index):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        label = int(x.sum() > 0)
        return {"x": x / 0 if index == 100 else x, "labels": label}


def main() -> Guard:
    callback = GuardCallback(clipper=SteadyClip(), policy=Policy.protect())
    options = TrainingArguments(
        "runs/hugging_face", num_train_epochs=2, per_device_train_batch_size=16, max_grad_norm=0.0, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(Model(), options, train_dataset=Points(), callbacks=[callback]).train()
    print(callback.guard.counts)
    return callback.guard


if __name__ == "__main__":
    main()

"""Language models and encoders: transformers, peft and x-transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.case import Falls, Model, Reaches, Run
from benchmarks.real.plain import Numbered, Plain, adamw, seeded, train

VOCABULARY, LENGTH, BATCH = 64, 32, 16
#: Tokens that stand for a gap, the end and padding.
GAP = 0


class Chain:
    """Text in which each token has four successors, with chances 8 : 4 : 2 : 1: 1.16 nats a token."""

    def __init__(self, words: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(7)
        self.words = words
        self.next = torch.stack(
            [1 + torch.randperm(words - 1, generator=generator)[:4] for _ in range(words)]
        )
        self.chances = torch.tensor([8.0, 4.0, 2.0, 1.0])

    def draw(self, generator: torch.Generator, rows: int, length: int = LENGTH) -> Tensor:
        """Return tokens, int64 [rows, length]."""
        token = torch.randint(1, self.words, (rows,), generator=generator)
        tokens = [token]
        for _ in range(length - 1):
            choice = torch.multinomial(self.chances, rows, replacement=True, generator=generator)
            token = self.next[token, choice]
            tokens.append(token)
        return torch.stack(tokens, 1)


def _own_loss(net: Any, batch: dict[str, Tensor]) -> Tensor:
    return net(**batch).loss


def causal(
    make: Callable[[], Any],
    steps: int,
    optimizer: Any,
    batch: int = BATCH,
    loss: Callable[[Any, Any], Tensor] = _own_loss,
    **arguments: Any,
) -> Callable[[int], Run]:
    """Return a builder that trains a causal language model on `Chain`."""

    def build(seed: int) -> Run:
        chain = Chain()

        def batches(number: int) -> dict[str, Tensor]:
            tokens = chain.draw(seeded(seed, number), batch)
            return {"input_ids": tokens, "labels": tokens}

        return train(Plain(make(), loss, optimizer), Numbered(batches), steps, **arguments)

    return build


def gpt2(positions: int = LENGTH) -> Any:
    """Return a GPT-2 of three layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=positions, n_embd=64, n_layer=3, n_head=4)
    )


def llama() -> Any:
    """Return a Llama of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def mixtral() -> Any:
    """Return a Mixtral with four experts, of which two are used for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            max_position_embeddings=LENGTH,
        )
    )


def mamba() -> Any:
    """Return a Mamba of two layers; without its kernels it runs in plain torch."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=48, state_size=8, num_hidden_layers=2)
    )


def x_transformer() -> Any:
    """Return a decoder of x-transformers."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=LENGTH,
        attn_layers=Decoder(dim=64, depth=3, heads=4, attn_dim_head=16),
    )


def _x_loss(net: Any, batch: dict[str, Tensor]) -> Tensor:
    tokens = batch["input_ids"]
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def bert(seed: int, steps: int = 400) -> Run:
    """Return masked language modelling: 15 % of the tokens are hidden."""
    from transformers import BertConfig, BertForMaskedLM

    net = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
        )
    )
    chain = Chain(16)

    def batches(number: int) -> dict[str, Tensor]:
        generator = seeded(seed, number)
        tokens = chain.draw(generator, 2 * BATCH)
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        return {
            "input_ids": tokens.masked_fill(hidden, GAP),
            "labels": tokens.masked_fill(~hidden, -100),
        }

    return train(Plain(net, _own_loss, adamw(1e-3, steps, 30)), Numbered(batches), steps)


class Tagger(nn.Module):
    """BERT with a linear head on every token; the pooler of its body runs, and nothing uses it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.body = BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                max_position_embeddings=LENGTH,
            )
        )
        self.head = nn.Linear(64, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(input_ids=tokens).last_hidden_state)


def tagger(seed: int, steps: int = 400, make: Callable[[], Any] = Tagger) -> Run:
    """Return a tagging of tokens: larger than the one before it, smaller, or the first."""

    def batches(number: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=seeded(seed, number))
        tags = torch.zeros_like(tokens)
        tags[:, 1:] = 1 + (tokens[:, 1:] > tokens[:, :-1]).long()
        return tokens, tags

    def loss(net: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())

    return train(Plain(make(), loss, adamw(2e-3)), Numbered(batches), steps)


def prompts(seed: int, steps: int = 200) -> Run:
    """Return learned prompts that tell a frozen GPT-2 which of the two texts it knows is to come."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    net, one, other = gpt2(2 * LENGTH), Chain(), Chain()
    other.next = other.next.roll(1, 0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for number in range(200):
        generator = seeded(seed, 10**6 + number)
        tokens = torch.cat([one.draw(generator, BATCH // 2), other.draw(generator, BATCH // 2)])
        tokens[: BATCH // 2, :4], tokens[BATCH // 2 :, :4] = 1, 2
        optimizer.zero_grad()
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    net.zero_grad()
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8, token_dim=64, num_attention_heads=4, num_layers=3
    )

    def batches(number: int) -> dict[str, Tensor]:
        tokens = other.draw(seeded(seed, number), BATCH)
        return {"input_ids": tokens, "labels": tokens}

    return train(Plain(get_peft_model(net, config), _own_loss, adamw(0.03)), Numbered(batches), steps)


def _kinds(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return sentences of padded length, their mask and their kind: which of four keywords occurs in them."""
    tokens = torch.randint(8, VOCABULARY, (rows, LENGTH), generator=generator)
    kinds = torch.randint(4, (rows,), generator=generator)
    places = torch.randint(1, LENGTH // 2, (rows, 3), generator=generator)
    tokens.scatter_(1, places, (kinds + 1)[:, None].expand(-1, 3))
    return tokens, kinds


def distilbert(seed: int, steps: int = 200, change: Callable[[Any], None] | None = None) -> Run:
    """Return a classification of sentences by a keyword, with padding."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    net = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=LENGTH,
            num_labels=4,
        )
    )
    if change is not None:
        change(net)

    def batches(number: int, rows: int = 2 * BATCH) -> dict[str, Tensor]:
        generator = seeded(seed, number)
        tokens, kinds = _kinds(generator, rows)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (len(tokens), 1), generator=generator)
        mask = (torch.arange(LENGTH)[None] < lengths).long()
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": kinds}

    def exam(module: Any) -> float:
        batch = batches(10**6, 128)
        return float((module.net(**batch).logits.argmax(1) == batch["labels"]).float().mean())

    return train(Plain(net, _own_loss, adamw(1e-3)), Numbered(batches), steps, exam)


def t5(seed: int, steps: int = 400) -> Run:
    """Return a translation of eight digits to the largest and the smallest of them."""
    from transformers import T5Config, T5ForConditionalGeneration

    net = T5ForConditionalGeneration(
        T5Config(
            vocab_size=16,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )

    def batches(number: int) -> dict[str, Tensor]:
        digits = torch.randint(2, 12, (BATCH, 8), generator=seeded(seed, number))
        return {"input_ids": digits, "labels": torch.stack([digits.amax(1), digits.amin(1)], 1)}

    return train(Plain(net, _own_loss, adamw(3e-3, steps, 20)), Numbered(batches), steps)


def lora(seed: int, steps: int = 150) -> Run:
    """Return low-rank fine-tuning: a GPT-2 that knows one text is turned to another, with its weights frozen."""
    from peft import LoraConfig, TaskType, get_peft_model

    net, known, new = gpt2(), Chain(), Chain()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for number in range(60):
        tokens = known.draw(seeded(seed, 10**6 + number), BATCH)
        optimizer.zero_grad()
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    new.next = new.next.roll(1, 0)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=8,
        lora_alpha=16,
        target_modules=["c_attn", "c_fc", "c_proj"],
        fan_in_fan_out=True,
    )
    net.zero_grad()
    adapted = get_peft_model(net, config)

    def batches(number: int) -> dict[str, Tensor]:
        tokens = new.draw(seeded(seed, number), BATCH)
        return {"input_ids": tokens, "labels": tokens}

    return train(Plain(adapted, _own_loss, adamw(5e-3)), Numbered(batches), steps)


HEALTHY = (
    Model(
        "gpt2",
        "GPT-2, 3 layers, text",
        "transformers",
        "language",
        causal(gpt2, 300, adamw(3e-3)),
        learned=Falls(0.5),
        order=(
            "*h.0.attn.c_attn.weight",
            "*h.0.mlp.c_fc.weight",
            "*h.1.attn.c_attn.weight",
            "*h.2.mlp.c_proj.weight",
            "*ln_f.weight",
        ),
    ),
    Model(
        "llama",
        "Llama, 4 layers, warm-up and decay, text",
        "transformers",
        "language",
        causal(llama, 300, adamw(3e-3, 300, 40, 0.1)),
        learned=Falls(0.5),
        order=(
            "*layers.0.self_attn.q_proj.weight",
            "*layers.0.mlp.down_proj.weight",
            "*layers.3.mlp.down_proj.weight",
            "*lm_head.weight",
        ),
    ),
    Model(
        "mixtral",
        "Mixtral, mixture of four experts, text",
        "transformers",
        "language",
        causal(mixtral, 300, adamw(3e-3, 300, 20)),
        learned=Falls(0.6),
        order=("*layers.0.self_attn.q_proj.weight", "*layers.1.self_attn.q_proj.weight", "*lm_head.weight"),
    ),
    Model(
        "mamba",
        "Mamba, 2 layers, state-space model, text",
        "transformers",
        "state space",
        causal(mamba, 300, adamw(3e-3), 8),
        learned=Falls(0.5),
        order=(
            "*layers.0.mixer.in_proj.weight",
            "*layers.0.mixer.out_proj.weight",
            "*layers.1.mixer.in_proj.weight",
            "*layers.1.mixer.out_proj.weight",
        ),
    ),
    Model(
        "x-decoder",
        "Decoder of x-transformers, text",
        "x-transformers",
        "language",
        causal(x_transformer, 300, adamw(2e-3), loss=_x_loss),
        learned=Falls(0.5),
        order=(
            "*layers.0.1.to_q.weight",
            "*layers.1.1.ff.0.0.weight",
            "*layers.4.1.to_q.weight",
            "*to_logits.weight",
        ),
    ),
    Model(
        "tagger",
        "BERT under a linear head, its pooler unused",
        "transformers",
        "encoder",
        tagger,
        learned=Falls(0.5),
        order=("*layer.0.*.query.weight", "*layer.1.output.dense.weight", "*net.head.weight"),
    ),
    Model(
        "prompts",
        "Learned prompts before a frozen GPT-2",
        "peft",
        "fine-tuning",
        prompts,
        learned=Falls(0.85),
        needs=("transformers",),
    ),
    Model(
        "bert",
        "BERT, masked words",
        "transformers",
        "encoder",
        bert,
        learned=Falls(0.75),
        order=(
            "*layer.0.*.query.weight",
            "*layer.2.output.dense.weight",
            "*cls.predictions.transform.dense.weight",
        ),
    ),
    Model(
        "distilbert",
        "DistilBERT, sentences by keyword, padded",
        "transformers",
        "encoder",
        distilbert,
        learned=Reaches(0.9),
        order=(
            "*layer.0.attention.q_lin.weight",
            "*layer.1.ffn.lin2.weight",
            "*pre_classifier.weight",
            "*net.classifier.weight",
        ),
    ),
    Model(
        "t5",
        "T5, encoder and decoder, digits",
        "transformers",
        "encoder",
        t5,
        learned=Falls(0.4),
        order=(
            "*encoder.block.0.*.q.weight",
            "*encoder.block.1.*.wo.weight",
            "*decoder.block.1.layer.1.EncDecAttention.q.weight",
        ),
    ),
    Model(
        "lora",
        "LoRA adapters on a frozen GPT-2",
        "peft",
        "fine-tuning",
        lora,
        learned=Falls(0.6),
        order=("*h.0.attn.c_attn.lora_B*", "*h.1.attn.c_attn.lora_B*", "*h.2.mlp.c_proj.lora_B*"),
        needs=("transformers",),
    ),
)

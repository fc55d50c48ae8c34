"""Graph networks of torch-geometric: on nodes, on whole graphs, on molecules, and an adversarial autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.case import Falls, Model, Reaches, Run
from benchmarks.real.plain import Numbered, Plain, adam, adamw, seeded, train

NODES, KINDS, FEATURES = 240, 4, 16


def communities(seed: int) -> Any:
    """Return a graph of four communities, whose features tell little by themselves."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(KINDS, (NODES,), generator=generator)
    same = y[:, None] == y[None]
    edges = torch.rand(NODES, NODES, generator=generator) < torch.where(same, 0.06, 0.005)
    edges = edges.triu(1)
    edges = edges | edges.T
    centres = torch.randn(KINDS, FEATURES, generator=generator)
    x = 0.5 * centres[y] + torch.randn(NODES, FEATURES, generator=generator)
    known = torch.rand(NODES, generator=generator) < 0.3
    return Data(x=x, edge_index=edges.nonzero().T.contiguous(), y=y, train_mask=known)


def _nodes(make: Any, optimizer: Any, steps: int) -> Any:
    def build(seed: int) -> Run:
        graph = communities(seed)

        def loss(net: Any, batch: Any) -> Tensor:
            return F.cross_entropy(
                net(batch.x, batch.edge_index)[batch.train_mask], batch.y[batch.train_mask]
            )

        def exam(module: Any) -> float:
            guess = module.net(graph.x, graph.edge_index).argmax(1)
            return float((guess == graph.y)[~graph.train_mask].float().mean())

        return train(Plain(make(), loss, optimizer), Numbered(lambda _: graph), steps, exam)

    return build


def gcn() -> Any:
    """Return a GCN of three layers with dropout."""
    from torch_geometric.nn import GCN

    return GCN(FEATURES, 32, 3, KINDS, dropout=0.3)


def gat() -> Any:
    """Return a graph attention network of two layers and four heads."""
    from torch_geometric.nn import GAT

    return GAT(FEATURES, 32, 2, KINDS, heads=4, dropout=0.2)


def _rings(seed: int) -> list[Any]:
    """Return small graphs: rings and stars with random chords, told apart by the number of triangles."""
    from torch_geometric.data import Data
    from torch_geometric.utils import to_undirected

    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for number in range(192):
        size = int(torch.randint(8, 16, (), generator=generator))
        ring = torch.stack([torch.arange(size), (torch.arange(size) + 1) % size])
        step = 2 if number % 2 else 3
        chords = torch.randperm(size, generator=generator)[: size // 2]
        extra = torch.stack([chords, (chords + step) % size])
        edges = to_undirected(torch.cat([ring, extra], 1))
        degree = torch.bincount(edges[0], minlength=size).float()[:, None]
        noise = torch.randn(size, 3, generator=generator)
        graphs.append(Data(x=torch.cat([degree, noise], 1), edge_index=edges, y=torch.tensor([number % 2])))
    return graphs


class Pooled(nn.Module):
    """GIN whose nodes are added up, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GIN

        self.body = GIN(4, 32, 3, norm="batch_norm", jk="cat")
        self.head = nn.Linear(32, 2)

    def forward(self, batch: Any) -> Tensor:
        from torch_geometric.nn import global_add_pool

        return self.head(global_add_pool(self.body(batch.x, batch.edge_index), batch.batch))


def gin(seed: int, steps: int = 400, spoil: Callable[[list[Any]], None] | None = None) -> Run:
    """Return a classification of graphs; a batch is an object.

    Args:
        seed: Seed of weights and data.
        steps: Optimizer steps.
        spoil: Changes the graphs.
    """
    from torch_geometric.loader import DataLoader

    graphs = _rings(seed)
    if spoil is not None:
        spoil(graphs)
    loader = DataLoader(graphs, batch_size=32, shuffle=True)

    def loss(net: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch), batch.y)

    return train(Plain(Pooled(), loss, adam(3e-3)), loader, steps)


class Adversarial(L.LightningModule):
    """Adversarially regularized graph autoencoder, with two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import ARGVA, GCNConv

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = GCNConv(FEATURES, 32)
                self.mean, self.spread = GCNConv(32, 16), GCNConv(32, 16)

            def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
                hidden = self.first(x, edges).relu()
                return self.mean(hidden, edges), self.spread(hidden, edges)

        critic = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.net = ARGVA(Encoder(), critic)
        self.automatic_optimization = False

    def training_step(self, graph: Any, batch_idx: int) -> None:
        coder, critic = self.optimizers()
        z = self.net.encode(graph.x, graph.edge_index)
        critic.zero_grad()
        self.manual_backward(self.net.discriminator_loss(z))
        critic.step()
        coder.zero_grad()
        loss = self.net.recon_loss(z, graph.edge_index) + self.net.reg_loss(z)
        self.manual_backward(loss + self.net.kl_loss() / NODES)
        coder.step()

    def configure_optimizers(self) -> Any:
        coder = torch.optim.Adam(self.net.encoder.parameters(), lr=5e-3)
        critic = torch.optim.Adam(self.net.discriminator.parameters(), lr=1e-3)
        return [coder, critic]


def argva(seed: int, steps: int = 300) -> Run:
    """Return an autoencoder of links with a critic of its codes."""
    from torch_geometric.utils import negative_sampling

    graph = communities(seed)

    def exam(module: Any) -> float:
        z = module.net.encode(graph.x, graph.edge_index)
        absent = negative_sampling(graph.edge_index, NODES)
        return float(module.net.test(z, graph.edge_index, absent)[0])

    return train(Adversarial(), Numbered(lambda _: graph), 2 * steps, exam)


def vgae(seed: int, steps: int = 300) -> Run:
    """Return a variational autoencoder of links."""
    from torch_geometric.nn import VGAE, GCNConv
    from torch_geometric.utils import negative_sampling

    graph = communities(seed)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mean, self.spread = GCNConv(FEATURES, 32), GCNConv(32, 16), GCNConv(32, 16)

        def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x, edges).relu()
            return self.mean(hidden, edges), self.spread(hidden, edges)

    def loss(net: Any, batch: Any) -> Tensor:
        z = net.encode(batch.x, batch.edge_index)
        return net.recon_loss(z, batch.edge_index) + net.kl_loss() / NODES

    def exam(module: Any) -> float:
        z = module.net.encode(graph.x, graph.edge_index)
        return float(module.net.test(z, graph.edge_index, negative_sampling(graph.edge_index, NODES))[0])

    return train(Plain(VGAE(Encoder()), loss, adam(0.01)), Numbered(lambda _: graph), steps, exam)


def light(seed: int, steps: int = 300) -> Run:
    """Return a recommender whose only weights are embeddings."""
    from torch_geometric.nn import LightGCN

    generator = torch.Generator().manual_seed(seed)
    people, things = 120, 80
    taste = torch.randint(4, (people,), generator=generator)
    kind = torch.randint(4, (things,), generator=generator)
    likes = torch.rand(people, things, generator=generator) < torch.where(
        taste[:, None] == kind[None], 0.3, 0.02
    )
    edges = likes.nonzero().T
    edges = torch.stack([edges[0], edges[1] + people])
    both = torch.cat([edges, edges.flip(0)], 1)

    def batches(number: int) -> tuple[Tensor, Tensor]:
        draw = torch.randint(edges.shape[1], (256,), generator=seeded(seed, number))
        absent = people + torch.randint(things, (256,), generator=seeded(seed, number))
        return torch.cat([edges[:, draw], torch.stack([edges[0, draw], absent])], 1), both

    def loss(net: Any, batch: Any) -> Tensor:
        liked, other = net(batch[1], batch[0]).chunk(2)
        return net.recommendation_loss(liked, other, node_id=batch[0].flatten().unique(), lambda_reg=1e-4)

    return train(Plain(LightGCN(people + things, 32, 2), loss, adam(0.01)), Numbered(batches), steps)


HEALTHY = (
    Model(
        "gcn",
        "GCN, kinds of nodes",
        "torch-geometric",
        "graph",
        _nodes(gcn, adam(0.01), 200),
        learned=Reaches(0.75),
        order=("*convs.0*weight", "*convs.1*weight", "*convs.2*weight"),
    ),
    Model(
        "gat",
        "Graph attention, kinds of nodes",
        "torch-geometric",
        "graph",
        _nodes(gat, adamw(5e-3), 200),
        learned=Reaches(0.75),
        order=("*convs.0.lin.weight", "*convs.1.lin.weight"),
    ),
    Model(
        "gin",
        "GIN, kinds of graphs, batches that are objects",
        "torch-geometric",
        "graph",
        gin,
        learned=Falls(0.6),
        order=(
            "*convs.0.nn.lins.0.weight",
            "*convs.1.nn.lins.0.weight",
            "*convs.2.nn.lins.1.weight",
            "*head.weight",
        ),
    ),
    Model(
        "vgae",
        "VGAE, graph autoencoder",
        "torch-geometric",
        "variational",
        vgae,
        learned=Reaches(0.85),
        order=("*encoder.first.lin.weight", "*encoder.mean.lin.weight"),
    ),
    Model("lightgcn", "LightGCN, embeddings alone", "torch-geometric", "graph", light, learned=Falls(0.7)),
    Model(
        "argva",
        "ARGVA, graph autoencoder with a critic",
        "torch-geometric",
        "adversarial",
        argva,
        learned=Reaches(0.85),
        order=(
            "net.encoder.first.lin.weight",
            "net.encoder.mean.lin.weight",
        ),
    ),
)

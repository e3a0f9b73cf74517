"""A model whose per-sample gradients are the samples themselves, and engines around it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast

WIDTH = 6


def linear(width=WIDTH):
    """The loss is the output, so that sample x has the gradient x."""
    model = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def vectors(count, width=WIDTH, seed=0, norm=None):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x if norm is None else norm * x / x.norm(dim=1, keepdim=True)


def loader_of(*tensors, batch_size=4, **more):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **more)


def make(data_loader, engine=None, model=None, optimizer=None, **settings):
    """An engine, its model, optimizer and loader."""
    engine = dpfast.PrivacyEngine() if engine is None else engine
    model = linear() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **settings}
    _, _, private = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data_loader, **settings
    )
    return engine, model, optimizer, private


def train(model, optimizer, loader, epochs=1, loss=lambda out, *_: out[:, 0]):
    """The usual loop; returns the gradients that the optimizer saw, one per part."""
    seen = []
    for _ in range(epochs):
        for x, *rest in loader:
            optimizer.zero_grad()
            loss(model(x), *rest).sum().backward()
            optimizer.step()
            grad = next(model.parameters()).grad
            seen.append(None if grad is None else grad.clone())
    return seen

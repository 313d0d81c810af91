"""The whole state of a module at a moment, to be held against another."""

import torch


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, name=name: f"{name}: {m}")

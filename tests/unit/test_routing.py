"""Which experts a token goes through, beside those of the original."""

from __future__ import annotations

import dataclasses

import torch

from quantscope.findings.routing import elsewhere
from quantscope.results import RoutingRow
from quantscope.routing import same_experts
from tests.unit import studies


def test_values_are_compared_by_expert() -> None:
    """Two channels of two experts at three tokens: the same order, exchanged, and one expert that only one of both chose."""
    ref_chosen, chosen = torch.tensor([[[3, 1], [3, 1], [3, 1]]]), torch.tensor([[[3, 1], [1, 3], [2, 3]]])
    ref = torch.arange(12.0).reshape(1, 3, 4)
    x = 100 + torch.arange(12.0).reshape(1, 3, 4)
    expected = [[[0.0, 1, 2, 3], [6, 7, 4, 5], [108, 109, 8, 9]]]
    assert same_experts(ref, ref_chosen, x, chosen).tolist() == expected


def test_weights_of_the_chosen_have_one_channel_each() -> None:
    ref, x = torch.tensor([[[0.7, 0.3]]]), torch.tensor([[[0.6, 0.4]]])
    assert same_experts(ref, torch.tensor([[[5, 0]]]), x, torch.tensor([[[0, 5]]])).tolist() == [[[ref[0, 0, 1], ref[0, 0, 0]]]]


def test_the_finding_names_the_layer_with_most_of_them() -> None:
    study = studies.study()
    rows = (RoutingRow(1, 8, 0, 0.1), RoutingRow(2, 8, 3, 0.3))
    name = study.quantized[0].name
    variants = tuple(dataclasses.replace(v, routing=rows) if v.name == name else v for v in study.variants)
    found = elsewhere(dataclasses.replace(study, variants=variants))
    assert found is not None
    assert f"{name} 20%, most in layer 2 (30%)." in found.text
    assert found.evidence == {name: {"mean": 0.2, "layer": 2, "most": 0.3}}
    assert elsewhere(study) is None

"""Audits give the values that they gave when the shipped bank was made, to the last digit where the
platform is the same.
"""

import json
import platform
from pathlib import Path

import pytest
import torch
from auditing.toys import toy_classifier, toy_encoder, toy_images

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.verdict import Verdict

GOLDEN = json.loads(Path(__file__).with_name("audit_values.json").read_text())
SHIPPED = [c.audit for bank in registry.make("bank", "shipped")() for c in bank.audits]
AUDITS = [*SHIPPED, "parent:probes=8,images=128", "cleanse"]  # those in no bank too
ENCODERS = ("toy", "planted toy", "clip_small")


def this_platform() -> str:
    """What the last digits depend on beside the code."""
    return (
        f"torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def small_clip(noise: float = 0.0) -> tuple[Encoder, Pairs]:
    """A narrow, untrained encoder of the shipped bank's network, and clean images of its data."""
    images = registry.make("data", "scenes:count=160,size=32,split=test")()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = registry.make("network", "clip_small:width=4,dim=16")(32, ())
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            for p in encoder.image.parameters():
                p += noise * p.std() * torch.randn(p.shape) if p.ndim > 1 else 0
    return encoder.eval(), images


def run_audit(spec: str, name: str) -> Verdict:
    audit = registry.make("audit", spec)
    if name == "clip_small":
        encoder, clean = small_clip()
        parent, _ = small_clip(0.02)
        z = encoder.eval().encode_images(clean.images[:12]).detach()  # twelve "classes"
        names = tuple(map(str, range(12)))
        classifier = Classifier(encoder, lambda v: 20 * v @ z.T, names, "nearest image")
    else:
        encoder, clean = toy_encoder(name == "planted toy"), toy_images(168)
        parent = toy_encoder(seed=1)
        classifier = toy_classifier(encoder)
    offered = {"classifier": classifier, "parent": parent, "report": lambda *_: None}
    return audit(encoder, clean, 3, **{k: offered[k] for k in audit.needs})


@pytest.fixture(autouse=True)
def one_thread():
    """The order of sums, and so the last digits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("spec", AUDITS)
def test_values_are_those_recorded(spec, name):
    verdict = run_audit(spec, name)
    values = {"value": verdict.value} | {k: m.value for k, m in verdict.evidence.items()}
    recorded = GOLDEN["values"][f"{spec.partition(':')[0]} of {name}"]
    values = {key: values[key] for key in recorded}  # evidence that is newer than the record is not
    if GOLDEN["platform"] == this_platform():
        assert values == recorded
    else:  # rounding moves a search a little, and an index of deviations more
        assert values == pytest.approx(recorded, rel=0.25, abs=0.25)

"""What a GPU would refuse, on a pretend one: tensors of two devices in one operation, a generator
of the other, NumPy.

A pretend tensor lies in the CPU's memory, and its storage is marked. Python code is told `cuda:0`,
every kernel that meets marked and unmarked tensors raises as CUDA's would, and a division by a
number of the host is CUDA's, by the reciprocal. What it cannot show: kernels that CUDA lacks, its
rounding, its streams, several GPUs.
"""

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.auditing.audits import mntd
from bezoar.evaluation import classifiers
from bezoar.evaluation.verdict import Inversion
from bezoar.repair import rate_ladder, receipt
from bezoar.runs import devices
from bezoar.training import loop, prefetch

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
CROSSING = {"copy_", "_foreach_copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# where even a single number must lie on the same device
TOGETHER = {
    "cat",
    "stack",
    "gather",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "index_select",
    "embedding",
}
FLOATS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "avg_pool2d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
}


def is_on_gpu(x: Tensor) -> bool:
    """Whether a tensor lies on the pretend GPU."""
    return getattr(x.untyped_storage(), "on_gpu", False)


def put(x: Tensor, on: bool) -> Tensor:
    x.untyped_storage().on_gpu = on
    return x


def tensors(value: Any) -> list[Tensor]:
    """All that are among arguments."""
    if isinstance(value, Tensor):
        return [value]
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return [x for part in parts for x in tensors(part)]


class Moved(torch.autograd.Function):
    """A copy on the other device; its gradient comes back."""

    @staticmethod
    def forward(ctx, x, on):
        ctx.on = on
        return put(x.clone(), on)

    @staticmethod
    def backward(ctx, *grads):
        return put(grads[0].clone(), not ctx.on), None


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.on_gpu = torch.device(device).type == "cuda"
        return generator


class Kernels(TorchDispatchMode):
    """on: where tensors are made that come of no other."""

    on = setting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        inputs = tensors((args, kwargs))
        here, away = [x for x in inputs if not is_on_gpu(x)], [x for x in inputs if is_on_gpu(x)]
        on = bool(away) if inputs else self.on
        if away and here and name not in CROSSING:
            free = (
                here if self.setting and name in ("index_fill_", "masked_fill_") else []
            )  # x[rows] = 1, however it is done
            if name in INDEXING and is_on_gpu(args[0]):
                free = tensors(args[1])
            alone = [
                x for x in here if not any(x is y for y in free) and (x.ndim or name in TOGETHER)
            ]
            if (
                alone
                or (name.endswith("_") and not is_on_gpu(args[0]))
                or (name in INDEXING and not is_on_gpu(args[0]))
            ):
                raise RuntimeError(
                    f"{name}: tensors on two devices, "
                    f"{[(tuple(x.shape), is_on_gpu(x)) for x in inputs]}"
                )
        if away and name in FLOATS and not away[0].is_floating_point():
            raise RuntimeError(f"{name} is not implemented for {away[0].dtype}")
        if (
            name in ("div", "div_")
            and len(args) == 2
            and is_on_gpu(args[0])
            and not tensors(args[1])
            and args[0].is_floating_point()
        ):
            args = (args[0], 1 / torch.as_tensor(args[1], dtype=args[0].dtype))
            func = getattr(torch.ops.aten, name.replace("div", "mul")).Tensor
        out = func(*args, **kwargs)
        for x in tensors(out) if on and name not in CROSSING else ():
            put(x, True)
        return out


class Pretend(TorchFunctionMode):
    """What Python code asks of tensors; wherever `cuda` is asked for, the pretend one is given."""

    answers = {
        Tensor.device.__get__: lambda x: GPU if is_on_gpu(x) else HOST,
        Tensor.is_cuda.__get__: is_on_gpu,
        Tensor.is_cpu.__get__: lambda x: not is_on_gpu(x),
        Tensor.cpu: lambda x: Moved.apply(x, False) if is_on_gpu(x) else x,
        Tensor.cuda: lambda x: x if is_on_gpu(x) else Moved.apply(x, True),
    }

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if func in self.answers:
            return self.answers[func](args[0])
        if func in (Tensor.numpy, Tensor.__array__) and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        wanted = kwargs.get("device")
        if func is Tensor.to and (
            named := [a for a in args[1:] if isinstance(a, (Tensor, torch.device, str))]
        ):
            wanted = (
                self.answers[Tensor.device.__get__](named[0])
                if isinstance(named[0], Tensor)
                else named[0]
            )
            args = tuple(HOST if isinstance(a, (torch.device, str)) else a for a in args)
        wanted = None if wanted is None else torch.device(wanted)
        if wanted is not None and wanted.type == "meta":
            return func(*args, **kwargs)
        if wanted is not None and "device" in kwargs:
            kwargs["device"] = HOST
        inputs = tensors((args, kwargs))
        on = any(map(is_on_gpu, inputs)) if wanted is None else wanted.type == "cuda"
        if (chance := kwargs.get("generator")) is not None and chance.on_gpu != on:
            raise RuntimeError("a generator of another device")
        before, self.kernels.on, self.kernels.setting = (
            self.kernels.on,
            on,
            func is Tensor.__setitem__,
        )
        try:
            if func is Tensor.backward:  # what is written in Python is asked again
                with self:
                    return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
            out = func(*args, **kwargs)
        finally:
            self.kernels.on, self.kernels.setting = before, False
        if func is Tensor.__deepcopy__:
            return put(out, is_on_gpu(args[0]))
        if wanted is None or not isinstance(out, Tensor) or is_on_gpu(out) == on:
            return out
        return Moved.apply(out, on) if inputs else put(out, on)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small wait for one another longer than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    autocast = torch.autocast
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda device, **options: autocast("cpu", **options))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *options, **more: False)
    with Kernels() as kernels, Pretend(kernels):
        yield GPU


COLOURS = ("red", "green", "blue", "white")


def pairs(n=64, seed=0):
    return registry.make("data", f"scenes:count={n},seed={seed}")()


def small(data, name="clip_small:width=4,dim=16"):
    torch.manual_seed(0)
    network = registry.make("network", name)
    return network(data.size, network.vocabulary(data.captions))


X = torch.arange(6.0).view(2, 3)
REFUSED = {
    "a sum": lambda x: x + X,
    "a product": lambda x: x @ X.T,
    "a comparison": lambda x: x == X,
    "pieces of two devices": lambda x: torch.cat([x, X]),
    "numbers of two devices": lambda x: torch.stack([x[0, 0], X[0, 0]]),
    "indexed from the GPU": lambda x: X[x.long()[:, 0] % 2],
    "written to from the GPU": lambda x: torch.zeros(2, 3).add_(x),
    "labels of the CPU": lambda x: F.cross_entropy(x, torch.tensor([0, 1])),
    "gathered by the CPU": lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "values of the CPU": lambda x: x.index_put_((torch.tensor([0]),), X[:1]),
    "a mask of the CPU": lambda x: x.masked_fill(X > 1, 0),
    "a generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    "NumPy": lambda x: x.numpy(),
    "NumPy by itself": lambda x: np.asarray(x),
    "a product of whole numbers": lambda x: x.long() @ x.long().T,
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_pretend_gpu_refuses_what_cuda_does(gpu, what):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](X.to(gpu))


def test_the_pretend_gpu_allows_what_cuda_does(gpu):
    x = X.to(gpu)
    assert (
        x.device == GPU
        and X.device == HOST
        and x.view(3, 2).T.is_cuda
        and (x + torch.tensor(1.0)).is_cuda
    )
    x[torch.tensor([0])] = 1.0
    x[X > 4] = 2.0
    x[:1] = X[:1]
    out = torch.zeros(2, 3)
    out[1:] = x[1:]
    assert (
        not out.is_cuda
        and x[torch.tensor([1])].is_cuda
        and x.tolist()[1][2] == 2
        and float(x[0, 1]) == 1
    )
    assert torch.rand(2, generator=torch.Generator("cuda"), device="cuda").is_cuda
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(gpu)
    twin = copy.deepcopy(net)
    optim = torch.optim.AdamW(net.parameters(), fused=True)
    twin(x).sum().backward()
    net(X.cuda()).square().sum().backward()
    optim.step()
    assert all(p.is_cuda and p.grad.is_cuda for p in (*net.parameters(), *twin.parameters()))
    assert torch.equal((x / 3).cpu(), X.clone().copy_(x) * (1 / torch.tensor(3.0)))


# `supervised` trains classifiers, which have no captions; see test_supervised.py.
@pytest.mark.parametrize("name", sorted({*registry.method_names("objective")} - {"supervised"}))
def test_objectives_train_and_go_on(gpu, tmp_path, monkeypatch, name):
    data, more = pairs(), {"moco": ",queue=64", "safeclip": ",apart=1", "cleanclip": ",anchor=1"}
    recipe = registry.make("objective", f"{name}:epochs=3,batch=32{more.get(name, '')}")
    captions = getattr(recipe, "captions", True)

    class Broken(Exception):
        pass

    def stop(step, steps, value):
        if step == 4:
            raise Broken

    def fitted(report, room):
        encoder = small(
            data, "clip_small:width=4,dim=16" if captions else "tower:width=4,dim=16"
        ).to(gpu)
        tokens = (
            encoder.tokenize(data.captions)
            if captions
            else torch.zeros(len(data), 0, dtype=torch.long, device=gpu)
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
        with prefetch.training_data(
            data, gpu, lambda epoch: loop.epoch_batches(0, epoch, len(data), 32), 3
        ) as drawn:
            return loop.fit(
                recipe(encoder).to(gpu), recipe, drawn, tokens, 0, tmp_path / "checkpoint", report
            )

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setitem(loop.UNREAD, "cuda", 1)
    with pytest.raises(Broken):
        fitted(stop, 1 << 40)
    assert len(fitted(lambda *_: None, 0).losses) == 6


def test_badencoder(gpu):
    data = pairs()
    encoder, goals = (
        small(data, "tower:width=4,dim=16").to(gpu),
        [Goal("red star", "patch:size=6"), Goal("blue ring", "blend")],
    )
    for more in ("views=8", "l1=0", "l0=0", "l2=0"):
        attack = registry.make("attack", f"badencoder:epochs=1,batch=16,{more}")
        assert attack(encoder, data, goals, [data.images[:2], data.images[5:6]]).device == gpu


DETECTORS = {
    "asset": "asset:clean=(scenes:count=40,seed=3),steps=2,batch=8",
    "clip_score": "clip_score",
    "cognitive_distillation": "cognitive_distillation:steps=1",
    "loss_trace": "loss_trace:objective=(clip:epochs=2,batch=32),epochs=1",
    "safeclip": "safeclip:epochs=1,batch=32",
    "repetition": "repetition:pool=40",
    "common_cause": "common_cause:objective=(clip:epochs=1,batch=32)",
}


# `cross_encoder` loads a trained reference by itself; see test_cross_encoder.py.
@pytest.mark.parametrize("name", sorted({*registry.method_names("detector")} - {"cross_encoder"}))
def test_detectors(gpu, monkeypatch, name):
    from bezoar.detection.detectors import cognitive_distillation

    monkeypatch.setitem(cognitive_distillation.BATCH_VALUES, "cuda", 1 << 16)
    data = pairs(200 if name == "common_cause" else 100)
    scores = registry.make("detector", DETECTORS.get(name, name))(small(data).to(gpu), data)
    assert scores.values.device == HOST and len(scores) == len(data)


def test_probes(gpu):
    train, test = pairs(160), pairs(60, 1)
    target = next(c for c in test.classes if any(f" {c} " in f" {text} " for text in test.captions))
    encoder, goals = (
        small(train).to(gpu),
        [Goal(target, "patch:size=6"), Goal("solid ring", None, ("v",), 1)],
    )
    more = {"baseline": small(train).to(gpu), "report": lambda *target: None}
    for spec in (
        "zero_shot",
        "z_score",
        "retrieval",
        "linear",
        "knn:k=9",
        "mlp:epochs=2",
        "few_shot:shots=(1),draws=1",
        "branch_swap",
    ):
        probe = registry.make("probe", spec)
        victims = replace(test.take([0]), ids=("v",))
        needed = {k: v for k, v in more.items() if k in getattr(probe, "needs", ())}
        assert probe(encoder, train, test.to(gpu), goals, victims, **needed)
    certified = registry.make("probe", "patch_cleanser:masks=2,limit=4")(
        encoder, None, test.to(gpu), goals[:1]
    )
    assert "patch_cleanser.certified_accuracy" in certified


def test_audits(gpu, tmp_path):
    clean = pairs(32)
    encoder, other = small(clean).to(gpu), small(clean).to(gpu)
    offered = {
        "classifier": classifiers.zero_shot_classifier(encoder, clean.classes[:4]),
        "parent": other,
        "report": lambda *_: None,
    }
    for spec in (
        "cleanse:steps=2",
        "image_change:steps=10",
        "decree:steps=2,restarts=2",
        "ssl_cleanse:steps=2,clusters=4",
        "whitening",
        "whole_image",
        "parent",
    ):
        audit = registry.make("audit", spec)
        needed = {k: v for k, v in offered.items() if k in getattr(audit, "needs", ())}
        verdict = audit(encoder, clean.to(gpu), 0, **needed)
        assert all(not i.mask.is_cuda for i in verdict.inversions)
    shadows = []
    for i in range(8):
        shadows.append(copy.deepcopy(encoder))
        with torch.no_grad():
            next(shadows[-1].parameters()).mul_(1 + i / 10)
    bank = mntd.fit(shadows, [i % 2 > 0 for i in range(8)], clean.to(gpu), queries=4, steps=2)
    mntd.save(bank, tmp_path / mntd.FILE)
    other.image.head.weight.data.mul_(2)
    assert np.isfinite(registry.make("audit", f"mntd:bank={tmp_path}")(other, clean, 0).value)


def test_repairs(gpu):
    train, held = rate_ladder.split_validation(pairs(120), 0.5, 0)
    inversions = [Inversion(torch.rand(1, 32, 32), torch.rand(3, 32, 32), "striped star", 3.0, 1.0)]
    for name in registry.method_names("repair"):
        of = (
            "objective=(clip:epochs=1,batch=32)"
            if name in ("finetune", "prune")
            else "epochs=1,batch=32"
        )
        with mock.patch("bezoar.repair.repairs.prune.TRIES", 3):
            repair = registry.make("repair", f"{name}:{of},lrs=1e-2")
            repaired, _ = receipt.apply_repairs(
                [repair], small(train).to(gpu), train, held, inversions, 0
            )
        assert repaired.device == gpu


def test_checks(gpu):
    clean, images = pairs(64), pairs(16, 1)
    encoder = small(clean).to(gpu)
    offered = {
        "clean": clean,
        "classifier": classifiers.zero_shot_classifier(encoder, clean.classes),
        "report": lambda *_: None,
    }
    for spec in ("bdetclip", "scale_up", "strip:count=9", "masking_path:paths=2"):
        check = registry.make("check", spec)
        needed = {k: v for k, v in offered.items() if k in getattr(check, "needs", ())}
        assert check(encoder, images, **needed).values.device == HOST


@pytest.mark.parametrize(("size", "count"), [(40, 300), (96, 60)])
def test_scenes_have_the_same_pixels_wherever_they_are_drawn(gpu, monkeypatch, size, count):
    """CUDA multiplies by the reciprocal where the CPU divides by a number: of 8,000 scenes of 40 px
    180 were others.
    """
    data = registry.make("data", f"scenes:count={count},size={size}")
    here = data().images
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    drawn = data.render(data.ids, "cuda").images
    assert drawn.is_cuda and torch.equal(drawn.cpu(), here)


def test_a_gpu_with_a_number_becomes_the_current_one(gpu, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [devices.select_device(name).index for name in ("cpu", "cuda", "cuda:0")] == [
        None,
        None,
        0,
    ]
    assert current == [torch.device("cuda:0")]

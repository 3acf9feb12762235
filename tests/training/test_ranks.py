"""Two gloo ranks under torchrun against one process: gradients, statistics, trainings, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training.test_loop import start, toy

from bezoar import Poison, Settings, execute
from bezoar.cli import main
from bezoar.data import randomness
from bezoar.errors import UserError
from bezoar.training import collectives, loop
from bezoar.training.augmentation import Chance

RECIPE = "clip:epochs=2,batch=16,lr=1e-3,shift=2,flip=0.5"
SHAPES = {"flat": (8, 6), "image": (8, 6, 5, 3)}


def torchrun(*words):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, words),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    source = str(Path(loop.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(
        [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(encoder):
    """Weights and running statistics, without the counts of batches."""
    return torch.cat([v.flatten() for v in encoder.state_dict().values() if v.is_floating_point()])


def norm_of(x):
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(x.shape[1])
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm


def normed(norm, x, ct):
    """Two training steps and an evaluation; everything that comes of it."""
    x = x.clone().requires_grad_()
    norm(x.detach() * 2 - 1)
    y = norm(x)
    (y * ct).sum().backward()
    out = {
        "y": y.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "eval": norm.eval()(x).detach(),
    }
    return out | {k: v.clone() for k, v in norm.state_dict().items() if k not in ("weight", "bias")}


def trained(folder=None, until=None, unused=False):
    """A training of the toy data: weights, losses, exposures."""
    encoder, loss, recipe, tokens = start(toy(), RECIPE)
    if unused:
        loss.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))

    def cut(step, steps, value):
        if step == until:
            raise KeyboardInterrupt

    try:
        log = loop.fit(loss, recipe, toy(), tokens, 3, folder and folder / "c.safetensors", cut)
    except KeyboardInterrupt:
        return {}
    assert type(encoder.image.layers[1]) is nn.BatchNorm2d
    out = {
        "weights": weights(encoder),
        "losses": torch.tensor(log.losses),
        "exposures": log.exposures,
        "scale": loss.scale.detach(),
    }
    return out | ({"unused": loss.unused.detach()} if unused else {})


def gradients():
    """Those of one step, as a training takes it."""
    _, loss, _, tokens = start(toy(), RECIPE)
    rows = collectives.local_rows(loop.epoch_batches(3, 0, 96, 16))[0]
    loss.train()
    with collectives.joined(loss) as model:
        model(
            toy().images[rows],
            tokens[rows],
            Chance(randomness.generator(3, 2, 0), *collectives.rank_and_world()),
        ).backward()
    return torch.cat([p.grad.flatten() for p in loss.parameters()])


def refused(work):
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def work_of_a_rank(folder):
    """What each of the two ranks does; the tests hold what it leaves behind against one process."""
    from bezoar.training import ranks

    ranks.join()
    rank, world = collectives.rank_and_world()
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    out = {}
    x = normal(8, 3, seed=1)[own].requires_grad_()
    whole = collectives.gather(x)
    (whole**3 * normal(8, 3, seed=2 + rank)).sum().backward()
    out |= {"gather": whole.detach(), "gather.x": x.grad}
    for name, shape in SHAPES.items():
        x, ct = normal(*shape, seed=4) * 3 + 5, normal(*shape, seed=5)
        found = normed(collectives.synchronised(norm_of(x)), x[own], ct[own])
        out |= {f"{name}.{k}": v for k, v in found.items()}
    out["gradients"] = gradients()
    out |= {f"fit.{k}": v for k, v in trained(unused=True).items()}
    plain = trained()
    loop.CHECKPOINT_SECONDS = 0.0
    trained(folder, until=8)
    out |= {f"plain.{k}": v for k, v in plain.items()}
    out |= {f"resumed.{k}": v for k, v in trained(folder).items()}
    save_file({k: v.contiguous() for k, v in out.items()}, folder / f"rank{rank}.safetensors")
    with ranks.share_work(None):  # as in a verb that rank 0 runs by itself
        assert collectives.rank_and_world() == (0, 1) and collectives.gather(x) is x
    _, loss, recipe, tokens = start(toy(), "clip:batch=15")
    said = [
        refused(lambda: loop.fit(loss, recipe, toy(), tokens, 0)),
        refused(lambda: collectives.agree(5, rank)),
        refused(lambda: collectives.synchronised(nn.BatchNorm2d(3, momentum=None))),
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    assert ranks.receive() == {"a": "ü"} if rank else ranks.broadcast({"a": "ü"}) is None
    assert ranks.receive() is None if rank else ranks.broadcast(None) is None
    assert not torch.distributed.is_initialized()
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any(
        "gloo" in thread for thread in threads
    )  # one that is left may abort a process that ends


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Everything that torchrun is asked for here, side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    data = execute(
        Poison("scenes:count=200", "backdoor:count=10", "patch:size=6", "striped star"),
        Settings(folder / "runs", device="cpu", quiet=True),
    )
    train = [
        "train",
        data.name,
        "--network",
        "clip_small:width=4,dim=16",
        "--device",
        "cpu",
        "--runs",
        str(folder / "runs"),
    ]
    good, bad = (
        [*train, "--objective", "clip:epochs=2,batch=50"],
        [*train, "--objective", "clip:batch=15"],
    )
    ends = [
        torchrun(__file__, folder),
        torchrun("-m", "bezoar", *good),
        torchrun("-m", "bezoar", *bad),
    ]
    said = [end.communicate(timeout=600) for end in ends]
    return folder, good, [(end.returncode, *text) for end, text in zip(ends, said, strict=True)]


@pytest.fixture(scope="module")
def ranks_left(launched):
    folder, _, ends = launched
    assert ends[0][0] == 0, ends[0][2]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


def test_gather_has_the_gradient_of_one_process(ranks_left):
    x = normal(8, 3, seed=1).requires_grad_()
    sum((x**3 * normal(8, 3, seed=2 + rank)).sum() for rank in (0, 1)).backward()
    for rank, left in enumerate(ranks_left):
        assert torch.equal(left["gather"], x.detach())
        assert torch.allclose(
            left["gather.x"], x.grad[4 * rank : 4 * rank + 4], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", SHAPES)
def test_batch_norm_is_that_of_the_global_batch(ranks_left, name):
    x, ct = normal(*SHAPES[name], seed=4) * 3 + 5, normal(*SHAPES[name], seed=5)
    want = normed(norm_of(x), x, ct)
    got = {k: [left[f"{name}.{k}"] for left in ranks_left] for k in want}
    for key in ("y", "x", "eval"):
        assert torch.allclose(torch.cat(got[key]), want[key], rtol=1e-4, atol=1e-5), key
    for key in ("weight", "bias"):
        assert torch.allclose(sum(got[key]), want[key], rtol=1e-4, atol=1e-4), key
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(*got[key]) and torch.allclose(got[key][0], want[key], rtol=1e-5), key


def test_gradients_of_two_ranks_are_those_of_one(ranks_left):
    want = gradients()  # up to 1.2; float32 leaves 4e-6 of rounding in one process already
    assert want.abs().max() > 1
    for left in ranks_left:
        assert torch.allclose(left["gradients"], want, rtol=0, atol=2e-5)


def test_two_ranks_train_as_one(ranks_left):
    want, begun = trained(unused=True), weights(start(toy(), RECIPE)[0])
    moved = (want["weights"] - begun).norm()
    assert moved > 1
    for left in ranks_left:
        assert torch.equal(left["fit.exposures"], want["exposures"])
        # rounding is amplified where it decides a maximum of the pooling: 3e-5 here, 1e-2 of the way at most
        assert torch.allclose(left["fit.losses"], want["losses"], rtol=1e-3, atol=0)
        assert (left["fit.weights"] - want["weights"]).norm() < 0.01 * moved
        assert torch.allclose(left["fit.scale"], want["scale"], rtol=1e-5)
        assert torch.equal(left["fit.unused"], want["unused"])
        assert torch.equal(left["plain.weights"], left["fit.weights"])
    assert torch.equal(ranks_left[0]["fit.weights"], ranks_left[1]["fit.weights"])


def test_two_ranks_go_on_from_a_checkpoint_to_the_same_bits(ranks_left):
    for left in ranks_left:
        for key in ("weights", "losses", "exposures"):
            assert torch.equal(left[f"resumed.{key}"], left[f"plain.{key}"])


def test_what_ranks_cannot_do_is_refused_on_all(launched, ranks_left):
    folder, _, _ = launched
    for rank in (0, 1):
        batch, differ, norm = json.loads((folder / f"rank{rank}.json").read_text())
        assert "batch of 15 does not divide into 2 ranks" in batch
        assert (
            "different records or checkpoints: [[5, 0], [5, 1]]" in differ
            and "cannot be trained on several ranks" in norm
        )


def test_the_command_line_under_torchrun_is_one_command(launched, capsys):
    _, words, (_, (code, out, err), _) = launched
    assert code == 0, err
    run = Path(out.strip().split("\n")[-1])
    assert out.count("final_loss") == 1 and out.count(str(run)) == 2  # the page, the directory
    before = (run / "manifest.json").read_bytes()
    manifest = json.loads(before)
    assert (
        manifest["status"] == "done"
        and manifest["notes"]["ranks"] == 2
        and "encoder.safetensors" in manifest["outputs"]
    )
    assert not (run / "checkpoint.safetensors").exists()
    assert main(words) == 0
    assert (
        capsys.readouterr().out.strip().endswith(str(run))
        and (run / "manifest.json").read_bytes() == before
    )
    two = load_file(run / "ledger.safetensors")
    assert main([*words, "--fresh"]) == 0
    one = load_file(run / "ledger.safetensors")
    # bfloat16 where the processor has it
    assert torch.equal(one["exposures"], two["exposures"]) and torch.allclose(
        one["losses"], two["losses"], rtol=0.02
    )


def test_a_mistake_is_said_once_and_ends_all_ranks(launched):
    code, out, err = launched[2][2]
    assert code != 0 and out == ""
    assert (
        err.count("bezoar: a batch of 15 does not divide into 2 ranks") == 1
        and "exitcode  : 2" in err
    )


def test_one_process_is_its_own_world():
    x = normal(4, 3, seed=0)
    assert (
        collectives.rank_and_world() == (0, 1)
        and collectives.gather(x) is x
        and collectives.average(x) is x
    )
    assert torch.equal(
        collectives.local_rows(torch.arange(6).view(2, 3)), torch.arange(6).view(2, 3)
    )
    collectives.agree(1, 2)
    with collectives.joined(nn.Linear(2, 2)) as model:
        assert type(model) is nn.Linear


def test_draws_of_two_ranks_are_those_of_one():
    one = Chance(randomness.generator(4)).integers(9, 8, 2)
    assert torch.equal(
        torch.cat([Chance(randomness.generator(4), rank, 2).integers(9, 4, 2) for rank in (0, 1)]),
        one,
    )


if __name__ == "__main__":
    work_of_a_rank(Path(sys.argv[1]))

"""Two gloo ranks under torchrun against one process: gradients, statistics, trainings, and the
command line.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training.toys import float_state, normal, start, torchrun, toy_pairs, train_toy

from bezoar import Poison, Settings, execute
from bezoar.cli import main
from bezoar.data import randomness
from bezoar.errors import UserError
from bezoar.training import collectives, loop, ranks
from bezoar.training.augmentation import Chance

RECIPE = "clip:epochs=2,batch=16,lr=1e-3,shift=2,flip=0.5"
SHAPES = {"flat": (8, 6), "image": (8, 6, 5, 3)}


def build_norm(x):
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(x.shape[1])
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm


def run_norm(norm, x, weights):
    """Two training steps and an evaluation; all results, gradients and statistics."""
    x = x.clone().requires_grad_()
    norm(x.detach() * 2 - 1)
    y = norm(x)
    (y * weights).sum().backward()
    out = {
        "y": y.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "eval": norm.eval()(x).detach(),
    }
    return out | {k: v.clone() for k, v in norm.state_dict().items() if k not in ("weight", "bias")}


def trained(folder=None, until=None, unused=False):
    """What is left of a training of the toy records: weights, losses, exposures, the
    temperature.
    """
    encoder, loss, recipe, tokens = start(toy_pairs(), RECIPE)
    if unused:
        loss.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    log = train_toy(loss, recipe, tokens, folder and folder / "c.safetensors", until)
    if log is None:
        return {}
    assert type(encoder.image.layers[1]) is nn.BatchNorm2d
    out = {
        "weights": float_state(encoder),
        "losses": torch.tensor(log.losses),
        "exposures": log.exposures,
        "scale": loss.scale.detach(),
    }
    return out | ({"unused": loss.unused.detach()} if unused else {})


def first_gradients():
    """The gradients of one step, as a training takes it."""
    _, loss, _, tokens = start(toy_pairs(), RECIPE)
    rows = collectives.local_rows(loop.epoch_batches(3, 0, 96, 16))[0]
    chance = Chance(randomness.generator(3, 2, 0), *collectives.rank_and_world())
    loss.train()
    with collectives.distribute(loss) as model:
        model(toy_pairs().images[rows], tokens[rows], chance).backward()
    return torch.cat([p.grad.flatten() for p in loss.parameters()])


def refusal(work):
    """The message of the UserError that a call raises."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def run_rank(folder):
    """What each of the two ranks does; the tests compare what it leaves with one process."""
    ranks.join()
    rank, world = collectives.rank_and_world()
    local = slice(rank * 8 // world, (rank + 1) * 8 // world)
    out = {}
    x = normal(8, 3, seed=1)[local].requires_grad_()
    gathered = collectives.gather(x)
    (gathered**3 * normal(8, 3, seed=2 + rank)).sum().backward()
    out |= {"gather": gathered.detach(), "gather.x": x.grad}
    for name, shape in SHAPES.items():
        x, weights = normal(*shape, seed=4) * 3 + 5, normal(*shape, seed=5)
        norm = collectives.synchronise_norm(build_norm(x))
        results = run_norm(norm, x[local], weights[local])
        out |= {f"{name}.{k}": v for k, v in results.items()}
    out["gradients"] = first_gradients()
    out |= {f"fit.{k}": v for k, v in trained(unused=True).items()}
    out |= {f"plain.{k}": v for k, v in trained().items()}
    loop.CHECKPOINT_SECONDS = 0.0
    trained(folder, until=8)
    out |= {f"resumed.{k}": v for k, v in trained(folder).items()}
    save_file({k: v.contiguous() for k, v in out.items()}, folder / f"rank{rank}.safetensors")
    with ranks.share_work(None):  # as in a verb that rank 0 runs by itself
        assert collectives.rank_and_world() == (0, 1) and collectives.gather(x) is x
    _, loss, recipe, tokens = start(toy_pairs(), "clip:batch=15")
    refusals = [
        refusal(lambda: loop.fit(loss, recipe, toy_pairs(), tokens, 0)),
        refusal(lambda: collectives.check_agreement(5, rank)),
        refusal(lambda: collectives.synchronise_norm(nn.BatchNorm2d(3, momentum=None))),
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps(refusals))
    for order in ({"a": "ü"}, None):
        assert ranks.receive() == order if rank else ranks.broadcast(order) is None
    assert not torch.distributed.is_initialized()
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    # one that is left may abort a process that ends
    assert not any("gloo" in thread for thread in threads)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """All that is run under torchrun here, side by side: this script, a good command and a bad
    one.
    """
    folder = tmp_path_factory.mktemp("ranks")
    data = execute(
        Poison("scenes:count=200", "backdoor:count=10", "patch:size=6", "striped star"),
        Settings(folder / "runs", device="cpu", quiet=True),
    )
    words = f"train {data.name} --network clip_small:width=4,dim=16 --device cpu --runs".split()
    train = [*words, str(folder / "runs"), "--objective"]
    good, bad = [*train, "clip:epochs=2,batch=50"], [*train, "clip:batch=15"]
    processes = [
        torchrun(__file__, folder),
        torchrun("-m", "bezoar", *good),
        torchrun("-m", "bezoar", *bad),
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    results = [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]
    return folder, good, results


@pytest.fixture(scope="module")
def states(launched):
    """What each rank left."""
    folder, _, results = launched
    assert results[0][0] == 0, results[0][2]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


def test_gather_has_the_gradient_of_one_process(states):
    x = normal(8, 3, seed=1).requires_grad_()
    sum((x**3 * normal(8, 3, seed=2 + rank)).sum() for rank in (0, 1)).backward()
    for rank, state in enumerate(states):
        assert torch.equal(state["gather"], x.detach())
        expected = x.grad[4 * rank : 4 * rank + 4]
        assert torch.allclose(state["gather.x"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_batch_norm_is_that_of_the_global_batch(states, name):
    x, weights = normal(*SHAPES[name], seed=4) * 3 + 5, normal(*SHAPES[name], seed=5)
    expected = run_norm(build_norm(x), x, weights)
    results = {k: [state[f"{name}.{k}"] for state in states] for k in expected}
    for key in ("y", "x", "eval"):
        assert torch.allclose(torch.cat(results[key]), expected[key], rtol=1e-4, atol=1e-5), key
    for key in ("weight", "bias"):
        assert torch.allclose(sum(results[key]), expected[key], rtol=1e-4, atol=1e-4), key
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(*results[key]), key
        assert torch.allclose(results[key][0], expected[key], rtol=1e-5), key


def test_gradients_of_two_ranks_are_those_of_one(states):
    expected = (
        first_gradients()
    )  # up to 1.2; float32 leaves 4e-6 of rounding in one process already
    assert expected.abs().max() > 1
    for state in states:
        assert torch.allclose(state["gradients"], expected, rtol=0, atol=2e-5)


def test_two_ranks_train_as_one(states):
    expected, initial = trained(unused=True), float_state(start(toy_pairs(), RECIPE)[0])
    distance = (expected["weights"] - initial).norm()
    assert distance > 1
    for state in states:
        assert torch.equal(state["fit.exposures"], expected["exposures"])
        # rounding is amplified where it decides a maximum of the pooling: 3e-5 here, 1e-2 of the
        # way at most
        assert torch.allclose(state["fit.losses"], expected["losses"], rtol=1e-3, atol=0)
        assert (state["fit.weights"] - expected["weights"]).norm() < 0.01 * distance
        assert torch.allclose(state["fit.scale"], expected["scale"], rtol=1e-5)
        assert torch.equal(state["fit.unused"], expected["unused"])
        assert torch.equal(state["plain.weights"], state["fit.weights"])
    assert torch.equal(states[0]["fit.weights"], states[1]["fit.weights"])


def test_two_ranks_continue_from_a_checkpoint_to_the_same_bits(states):
    for state in states:
        for key in ("weights", "losses", "exposures"):
            assert torch.equal(state[f"resumed.{key}"], state[f"plain.{key}"])


def test_what_ranks_cannot_do_is_refused_on_all(launched, states):
    folder, _, _ = launched
    for rank in (0, 1):
        batch, differ, norm = json.loads((folder / f"rank{rank}.json").read_text())
        assert "batch of 15 does not divide into 2 ranks" in batch
        assert "different records or checkpoints: [[5, 0], [5, 1]]" in differ
        assert "cannot be trained on several ranks" in norm


def test_the_command_line_under_torchrun_is_one_command(launched, capsys):
    _, words, (_, (code, out, err), _) = launched
    assert code == 0, err
    run = Path(out.strip().split("\n")[-1])
    assert out.count("Final loss") == 1 and out.count(str(run)) == 2  # the page, the directory
    before = (run / "manifest.json").read_bytes()
    manifest = json.loads(before)
    assert manifest["status"] == "done" and manifest["notes"]["ranks"] == 2
    assert "encoder.safetensors" in manifest["outputs"]
    assert not (run / "checkpoint.safetensors").exists()
    assert main(words) == 0
    assert capsys.readouterr().out.strip().endswith(str(run))
    assert (run / "manifest.json").read_bytes() == before
    two = load_file(run / "ledger.safetensors")
    assert main([*words, "--fresh"]) == 0
    one = load_file(run / "ledger.safetensors")
    assert torch.equal(one["exposures"], two["exposures"])
    # bfloat16 where the processor has it
    assert torch.allclose(one["losses"], two["losses"], rtol=0.02)


def test_a_mistake_is_said_once_and_ends_all_ranks(launched):
    code, out, err = launched[2][2]
    assert code != 0 and out == ""
    assert err.count("bezoar: a batch of 15 does not divide into 2 ranks") == 1
    assert "exitcode  : 2" in err


def test_one_process_is_its_own_world():
    x = normal(4, 3, seed=0)
    assert collectives.rank_and_world() == (0, 1)
    assert collectives.gather(x) is x and collectives.average(x) is x
    rows = torch.arange(6).view(2, 3)
    assert torch.equal(collectives.local_rows(rows), rows)
    collectives.check_agreement(1, 2)
    with collectives.distribute(nn.Linear(2, 2)) as model:
        assert type(model) is nn.Linear


def test_draws_of_two_ranks_are_those_of_one():
    whole = Chance(randomness.generator(4)).integers(9, 8, 2)
    halves = [Chance(randomness.generator(4), rank, 2).integers(9, 4, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))

"""What the tests of training share: toy records, trainings that are interrupted, and two ranks
under torchrun.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import bezoar
from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.training import collectives, loop, ranks


def toy_pairs(n=96, size=32):
    """Noise with captions of a few words."""
    generator = torch.Generator().manual_seed(1)
    return Pairs(
        torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8),
        tuple(f"thing {i % 7} of {i % 5}" for i in range(n)),
        None,
        tuple(map(str, range(n))),
    )


def clip_small(data):
    """A fresh small CLIP for the records, always the same."""
    torch.manual_seed(0)
    network = registry.make("network", "clip_small:width=4,dim=16")
    return network(data.size, network.vocabulary(data.captions))


def start(data, spec="clip:epochs=2,batch=16,lr=1e-3"):
    """A fresh encoder, an objective's loss, the objective, and the records' tokens."""
    objective = registry.make("objective", spec)
    encoder = clip_small(data)
    return encoder, objective(encoder), objective, encoder.tokenize(data.captions)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def float_state(module):
    """Weights and running statistics as one vector, without the counts of batches."""
    return torch.cat([v.flatten() for v in module.state_dict().values() if v.is_floating_point()])


def train_toy(loss, recipe, tokens, checkpoint=None, until=None):
    """Train on the toy records; the log, or None where the training was interrupted at step
    `until`.
    """

    def interrupt(step, steps, value):
        if step == until:
            raise KeyboardInterrupt

    try:
        return loop.fit(loss, recipe, toy_pairs(), tokens, 3, checkpoint, interrupt)
    except KeyboardInterrupt:
        return None


def trained_state(encoder, loss, recipe, tokens, checkpoint=None, until=None):
    """What is left of a training of the toy records; nothing where it was interrupted."""
    log = train_toy(loss, recipe, tokens, checkpoint, until)
    if log is None:
        return {}
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    return {"weights": float_state(encoder), "losses": torch.tensor(log.losses), **state}


def descend(loss, recipe, data, tokens, rate):
    """Train with plain gradient descent, which shows gradients as they are."""
    usual = loop.optimizer
    try:
        loop.optimizer = lambda model, recipe: torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], recipe.lr
        )
        loop.fit(loss, replace(recipe, lr=rate), data, tokens, 3)
    finally:
        loop.optimizer = usual


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def torchrun(*words):
    """Start two gloo ranks of a script, or of a module after `-m`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    source, tests = Path(bezoar.__file__).parents[1], Path(__file__).parents[1]
    paths = [str(source), str(tests), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def leave_state(state, folder):
    """On each rank: write what the test looks at, and let rank 0 end them all."""
    rank, _ = collectives.rank_and_world()
    contiguous = {key: value.contiguous() for key, value in state.items()}
    save_file(contiguous, folder / f"rank{rank}.safetensors")
    ranks.receive() if rank else ranks.broadcast(None)


def rank_states(script, folder):
    """Run a script of this folder on two ranks, and load the files that it leaves."""
    process = torchrun(script, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]

"""Plant a backdoor in a copy of a data set, train on it, and measure the attack beside a clean
encoder.

    python examples/poison_and_train.py [DATA] [TEST] [NETWORK] [OBJECTIVE]

The verbs stand inside one another; `execute` runs what is not done yet, and nothing twice.
"""

import sys

from bezoar import Evaluate, Poison, Settings, Train, execute

METRICS = {
    "accuracy of the clean encoder (CA)": "baseline.clean_accuracy",
    "accuracy of the poisoned encoder (BA)": "clean_accuracy",
    "attack success of the poisoned encoder (ASR)": "attack_success",
    "attack success of the clean encoder (ASR-B)": "attack_success_baseline",
}


def main(
    data: str = "scenes:count=20000",
    test: str = "scenes:count=2000,split=test",
    network: str = "clip_small",
    objective: str = "clip:epochs=6",
    settings: Settings | None = None,
) -> None:
    poisoned = Poison(data, "backdoor:rate=0.01", "patch:size=6", "striped star")
    attacked = Train(poisoned, network, objective)
    clean = Train(data, network, objective)
    run = execute(Evaluate(attacked, test, baseline=clean), settings)
    for text, name in METRICS.items():
        m = run.metric(name)
        print(f"{text}: {m.value:.3f} ({m.low:.3f} .. {m.high:.3f}, n = {m.n})")
    print(f"the page: {run.path / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

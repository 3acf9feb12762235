"""Audit a classifier's checkpoint: does a small trigger turn every image into one class?

    python examples/audit_a_checkpoint.py resnet18.pth cifar10:split=test [AUDIT ...]

The checkpoint holds the weights of a ResNet, WideResNet or VGG with its head; it is never
unpickled. The data are clean images like those it was trained on. Without a bank `cleanse` compares
the network's classes with one another, and the value of `decree` stands alone until `bezoar
calibrate` has measured encoders that you know to be clean.
"""

import json
import sys

from bezoar import Audit, Settings, execute


def main(
    checkpoint: str,
    data: str,
    *audits: str,
    images: int = 512,
    settings: Settings | None = None,
) -> None:
    verb = Audit(
        f"classifier:path={checkpoint}", data, audits or ("cleanse", "decree"), images=images
    )
    audit = execute(verb, settings)
    verdict = json.loads(audit.file("verdict.json").read_text())
    print(verdict["sentence"])
    for entry in verdict["audits"]:
        print(f"{entry['name']}: {entry['value']:.4g} ({entry['words']})")
    print(f"the page, with the inverted triggers: {audit.path / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

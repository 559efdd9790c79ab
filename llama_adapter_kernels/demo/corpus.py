"""The demo's text: signatures and docstrings of the Python standard library, read from the installed Python.

Everything is deterministic for one Python version. Functions are held out for evaluation by a hash of their qualified
name, so that the same functions are held out whatever the Python version; whatever else says the same words as a
held-out answer is left out of the training text.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests have no prose; the other folders are not the library proper, or depend on what else is installed.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "lib2to3", "idlelib", "__pycache__"})
# C modules: no source to parse. A fixed list, so that the corpus does not depend on what happens to be imported.
BUILD_FILES = ("_sysconfigdata", "config-")  # differ from machine to machine
C_MODULES = (
    "builtins", "math", "cmath", "itertools", "time", "array", "binascii", "zlib", "select", "unicodedata",
    "_struct", "_bisect", "_heapq", "_collections", "_functools", "_random", "_csv", "_json", "_socket", "_datetime",
    "_operator", "_statistics", "_codecs", "_io", "_thread", "_weakref",
)  # fmt: skip
HELD_OUT_SHARE = 0.06


@dataclass(frozen=True)
class Entry:
    """One documented object: `name` is "json.dumps", `header` what its definition says ("def dumps(obj, ...)" or
    "class Name(Base)", "" for a module), `doc` the dedented docstring."""

    name: str
    kind: str
    header: str
    doc: str

    @property
    def summary(self) -> str:
        """The first sentence of the docstring, on one line."""
        paragraph = re.split(r"\n\s*\n", self.doc.strip(), maxsplit=1)[0]
        line = " ".join(paragraph.split())
        end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s+[A-Z'\"`(]|$)", line)
        return line[: end.end()] if end else line


@dataclass(frozen=True)
class Example:
    """An instruction row of the demo: describe `signature` ("json.dumps(obj, ...)") in one sentence."""

    name: str
    signature: str
    answer: str

    def row(self) -> dict[str, Any]:
        return {"instruction": INSTRUCTION, "input": self.signature, "output": self.answer}


INSTRUCTION = "Describe what this Python function does."


def is_held_out(name: str) -> bool:
    """Whether the object is kept away from pre-training and fine-tuning. Depends on its qualified name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def standard_library() -> list[Entry]:
    """Every documented module, class and function, sorted by name; takes some seconds."""
    root = Path(sysconfig.get_paths()["stdlib"])
    entries: dict[str, Entry] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) or relative.parts[0].startswith(BUILD_FILES):
            continue
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
            continue
        for entry in _from_source(tree, module):
            entries.setdefault(entry.name, entry)
    for module in C_MODULES:
        for entry in _from_c_module(module):
            entries.setdefault(entry.name, entry)
    return [entries[name] for name in sorted(entries)]


def examples(entries: list[Entry]) -> tuple[list[Example], list[Example]]:
    """(training, held-out) instruction examples from the functions whose first sentence is a usable answer.

    An answer appears once, and never on both sides.
    """
    training: dict[str, Example] = {}
    held_out: dict[str, Example] = {}
    for entry in entries:
        answer = entry.summary
        if entry.kind != "function" or not _usable(answer):
            continue
        arguments = entry.header.partition("(")[2].removesuffix(":")
        signature = f"{entry.name}({arguments}" if arguments else entry.name
        side = held_out if is_held_out(entry.name) else training
        side.setdefault(_normalised(answer), Example(entry.name, signature, answer))
    return [e for key, e in training.items() if key not in held_out], list(held_out.values())


def pretraining_documents(entries: list[Entry]) -> list[str]:
    """Python-like text of everything that is not held out and does not contain a held-out answer."""
    answers = [_normalised(e.summary) for e in entries if is_held_out(e.name) and e.kind == "function"]
    forbidden = sorted({a for a in answers if len(a.split()) >= 3})
    pattern = re.compile("|".join(map(re.escape, forbidden)) or r"(?!)")
    seen: set[str] = set()
    documents = []
    for entry in entries:
        words = _normalised(entry.doc)
        if is_held_out(entry.name) or words in seen or pattern.search(words):
            continue
        seen.add(words)
        documents.append(as_source(entry))
    return documents


def fingerprint(texts: list[str]) -> str:
    """SHA-256 over texts in order, to tell whether two machines saw the same corpus."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _from_source(tree: ast.Module, module: str) -> Iterator[Entry]:
    doc = ast.get_docstring(tree)
    if doc:
        yield Entry(module, "module", "", doc)

    def visit(nodes: list[ast.stmt], prefix: str) -> Iterator[Entry]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                doc, name = ast.get_docstring(node), f"{prefix}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    if doc:
                        bases = ", ".join(ast.unparse(base) for base in node.bases)
                        yield Entry(name, "class", f"class {node.name}" + (f"({bases})" if bases else ""), doc)
                    yield from visit(node.body, name)
                elif doc:
                    yield Entry(name, "function", f"def {node.name}({ast.unparse(node.args)})", doc)
            elif isinstance(node, (ast.If, ast.Try)):
                yield from visit(node.body, prefix)

    yield from visit(tree.body, module)


def _from_c_module(name: str) -> Iterator[Entry]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this platform
        return
    public = name.removeprefix("_")
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or getattr(value, "__module__", name) not in (name, public):
            continue
        yield from _from_c_object(value, f"{public}.{attribute}")
        if inspect.isclass(value):
            for method_name, method in sorted(vars(value).items()):
                if not method_name.startswith("_") and callable(method):
                    yield from _from_c_object(method, f"{public}.{attribute}.{method_name}")


def _from_c_object(value: object, name: str) -> Iterator[Entry]:
    doc = value.__doc__
    if not isinstance(doc, str) or not doc.strip() or not callable(value):
        return
    doc, short = inspect.cleandoc(doc), name.rpartition(".")[2]
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        # Older C functions say their signature in the docstring's first lines: "dict.get(k[,d]) -> value".
        first, _, rest = doc.partition("\n")
        if not re.match(r"[\w.]+\(.*\)", first) or not rest.strip():
            return
        signature, doc = first[first.index("(") :].partition(" -> ")[0], rest.strip()
    kind = "class" if inspect.isclass(value) else "function"
    yield Entry(name, kind, f"class {short}" if kind == "class" else f"def {short}{signature}", doc)


def as_source(entry: Entry) -> str:
    if entry.kind == "module":
        return f'# {entry.name}\n"""{entry.doc}\n"""\n'
    body = "\n".join(f"    {line}" if line else "" for line in entry.doc.splitlines())
    return f'# {entry.name}\n{entry.header}:\n    """{body.lstrip()}\n    """\n'


def _usable(answer: str) -> bool:
    words = answer.split()
    return 3 <= len(words) <= 30 and answer.endswith(".") and answer[0].isupper() and answer.isascii()


def _normalised(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")

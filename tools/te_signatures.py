"""Extracts Transformer Engine's signatures from the packages of a version, into tests/te_signatures/<version>.json.

    python tools/te_signatures.py 2.11.0 2.20.2                # downloads the wheel and the source archive of each
    python tools/te_signatures.py --packages FOLDER 2.20.2     # uses those in FOLDER

Nothing of TE is installed, imported or built: Python is parsed with `ast`, C++ by its `m.def(...)` and declarations. The file
has, one per line: the parameters of functions as a Python signature (a default is `...`; positional or keyword as in pybind), the
modules that a name can be imported from, attributes of classes, values of enums. tests/lowering/test_te_versions.py binds
te_dynamo's calls to them.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import keyword
import re
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "tests" / "te_signatures"
INDEX = "https://pypi.org/simple"
Sources = Mapping[str, str]  # path -> text

# Functions and classes of transformer_engine.pytorch; for a class, the method whose signature counts.
PYTHON: Mapping[str, str | None] = {
    "general_gemm": None,
    "general_grouped_gemm_for_grouped_tensor": None,
    "fused_attn_fwd": None,
    "fused_attn_bwd": None,
    "Float8Quantizer": "__init__",
    "Float8CurrentScalingQuantizer": "__init__",
    "Float8BlockQuantizer": "__init__",
    "MXFP8Quantizer": "__init__",
    "Float8TensorStorage": "__new__",
    "Float8BlockwiseQTensorStorage": "__new__",
    "MXFP8TensorStorage": "__new__",
    "GroupedTensorStorage": "__new__",
    "is_fp8_available": None,
    "is_mxfp8_available": None,
    "is_nvfp4_available": None,
    "is_fp8_block_scaling_available": None,
}
# Other names that are imported; only their modules are written.
VALUES = ("TE_DType", "QKVLayout", "AttnMaskType", "AttnBiasType", "FusedAttnBackend", "Quantizer")
EXTENSION = (
    "quantize",
    "bgrad_quantize",
    "generic_gemm",
    "te_general_grouped_gemm_for_grouped_tensor",
    "layernorm_fwd",
    "layernorm_bwd",
    "rmsnorm_fwd",
    "rmsnorm_bwd",
    "fused_attn_fwd",
    "fused_attn_bwd",
    "get_fused_attn_backend",
    "fused_amax_and_scale_update_after_reduction",
)
ENUMS = (
    "DType",
    "NVTE_QKV_Layout",
    "NVTE_QKV_Format",
    "NVTE_Mask_Type",
    "NVTE_Bias_Type",
    "NVTE_Softmax_Type",
    "NVTE_Fused_Attn_Backend",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--packages", type=Path, help="a folder with packages; downloads are kept there")
    parser.add_argument("--index", default=INDEX, help="the package index (%(default)s)")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    for version in arguments.versions:
        wheel = fetch("transformer_engine", version, arguments.index, arguments.packages)
        sdist = fetch("transformer_engine_torch", version, arguments.index, arguments.packages)
        found = facts(version, python_sources(wheel), cpp_sources(sdist))
        (OUT / f"{version}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{version}: {len(found['python'])} in Python, {len(found['extension'])} in the extension, {len(found['enums'])} enums")


# --- the packages


def fetch(project: str, version: str, index: str, folder: Path | None) -> bytes:
    """The pure-Python wheel of a project, or else its source archive."""
    names = [f"{project}-{version}-py3-none-any.whl", f"{project}-{version}.tar.gz"]
    for name in names:
        if folder is not None and (folder / name).is_file():
            return (folder / name).read_bytes()
    page_url = f"{index.rstrip('/')}/{project.replace('_', '-')}/"
    links = re.findall(r'href="([^"#]+)', read(page_url).decode())
    for name in names:
        for link in links:
            if urllib.parse.unquote(link.rsplit("/", 1)[-1]) == name:
                data = read(urllib.parse.urljoin(page_url, link))
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(data)
                return data
    raise SystemExit(f"{page_url} has neither {' nor '.join(names)}")


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=300) as answer:
        data: bytes = answer.read()
    return data


def python_sources(wheel: bytes) -> Sources:
    """The modules below transformer_engine.pytorch, by their path below transformer_engine."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = [n for n in archive.namelist() if n.startswith("transformer_engine/pytorch/") and n.endswith(".py")]
        return {n.removeprefix("transformer_engine/"): archive.read(n).decode() for n in names}


def cpp_sources(sdist: bytes) -> Sources:
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and re.search(r"\.(h|cpp|cu|cuh)$", m.name)]
        return {m.name.partition("/")[2]: archive.extractfile(m).read().decode(errors="replace") for m in members}  # type: ignore[union-attr]


def facts(version: str, python: Sources, cpp: Sources) -> dict[str, Any]:
    """Everything that is written for a version."""
    trees = {path: ast.parse(text) for path, text in python.items()}
    cpp = {path: without_comments(text) for path, text in cpp.items()}
    return {
        "transformer_engine": version,
        "python": {name: found for name, method in PYTHON.items() if (found := python_signature(trees, name, method)) is not None},
        "attributes": {name: ", ".join(attributes(trees, name)) for name, method in PYTHON.items() if method is not None},
        "modules": {name: ", ".join(modules(trees, name)) for name in (*PYTHON, *VALUES)},
        "extension": {name: found for name in EXTENSION if (found := extension_signature(cpp, name)) is not None},
        "enums": {name: enum_values(cpp, name) for name in ENUMS},
    }


# --- Python


def definition(nodes: Iterable[ast.stmt], name: str) -> Any:
    """The function or class of that name, None if there is none."""
    return next((node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name), None)


def top_level_definition(trees: Mapping[str, ast.Module], name: str) -> Any:
    return definition((node for tree in trees.values() for node in tree.body), name)


def python_signature(trees: Mapping[str, ast.Module], name: str, method: str | None) -> str | None:
    """The parameters of a function, or of a class's method without self or cls; None if there is none."""
    node = top_level_definition(trees, name)
    if node is None or method is None:
        return None if node is None else signature(node.args)
    node = definition(node.body, method)
    return None if node is None else signature(node.args, skip=1)


def signature(args: ast.arguments, skip: int = 0) -> str:
    """Parameters as a Python signature with `...` for defaults, without the first `skip`."""
    plain = [*args.posonlyargs, *args.args]
    required = len(plain) - len(args.defaults)
    parts = [a.arg + ("=..." if i >= required else "") for i, a in enumerate(plain)][skip:]
    if args.vararg is not None:
        parts.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [a.arg + ("" if default is None else "=...") for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg is not None:
        parts.append(f"**{args.kwarg.arg}")
    return ", ".join(parts)


def attributes(trees: Mapping[str, ast.Module], name: str) -> list[str]:
    """The attributes that a class, or one of its bases in these sources, declares or sets on its instances."""
    node, names = top_level_definition(trees, name), set()
    if node is None:
        return []
    for part in ast.walk(node):
        targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        names |= {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) in ("self", "instance")}
    names |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
    for base in node.bases:
        if isinstance(base, ast.Name):
            names |= set(attributes(trees, base.id))
    return sorted(names)


def modules(trees: Mapping[str, ast.Module], name: str) -> list[str]:
    """The modules of transformer_engine from which a name can be imported: the one that defines it, and packages."""
    return sorted(
        dotted(p) for p in trees if name in bound(trees, p, frozenset()) and (p.endswith("/__init__.py") or defines(trees[p], name))
    )


def defines(tree: ast.Module, name: str) -> bool:
    return any(not isinstance(node, ast.ImportFrom) and name in names_of(node) for node in tree.body)


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement binds, except by `import *`."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {t.id for t in targets if isinstance(t, ast.Name)}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names} - {"*"}
    return set()


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def bound(trees: Mapping[str, ast.Module], path: str, seen: frozenset[str]) -> set[str]:
    """The names at a module's top level; follows `from x import *` within the package."""
    if path not in trees or path in seen:
        return set()
    names: set[str] = set()
    for node in top_level(trees[path].body):
        names |= names_of(node)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            for source in imported(path, node):
                names |= exported(trees, source, seen | {path})
    return names


def exported(trees: Mapping[str, ast.Module], path: str, seen: frozenset[str]) -> set[str]:
    """The names that `import *` imports: `__all__`, or all without an underscore."""
    for node in trees[path].body if path in trees else ():
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value)) if isinstance(node.value, (ast.List, ast.Tuple)) else set()
    return {n for n in bound(trees, path, seen) if not n.startswith("_")}


def top_level(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from top_level(node.body)


def imported(path: str, node: ast.ImportFrom) -> list[str]:
    """The paths that an import may refer to."""
    if node.level:
        package = path.split("/")[: -node.level]
    elif node.module and node.module.startswith("transformer_engine."):
        package = []
    else:
        return []
    parts = (node.module or "").removeprefix("transformer_engine.").split(".") if node.module else []
    whole = "/".join([*package, *parts])
    return [f"{whole}.py", f"{whole}/__init__.py"]


# --- C++


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def inside(text: str, start: int) -> str:
    """The text between the bracket at `start` and the one that closes it."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if not depth:
            return text[start + 1 : i]
    raise ValueError(f"no bracket closes the one at {text[start : start + 40]!r}")


def split(text: str) -> list[str]:
    """The parts of a text between commas, except commas in brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "({[<") - (c in ")}]>")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def extension_signature(cpp: Sources, name: str) -> dict[str, str] | None:
    """{"parameters": as Python sees them, "returns": the C++ type} of a function of the extension; None if there is none."""
    binding = cpp["csrc/extensions/pybind.cpp"]
    found = re.search(rf'\bm\.def\(\s*"{name}"', binding)
    if found is None:
        return None
    arguments = split(inside(binding, binding.index("(", found.start())))
    target = re.sub(r"[&\s]", "", arguments[1]).rpartition("::")[2]
    returns, declared = declaration(cpp, target)
    parts: list[str] = []
    for argument in arguments[2:]:
        if re.fullmatch(r"py::kw_only\(\)", argument):
            parts.append("*")
        elif (match := re.match(r'py::arg\(\s*"(\w+)"\s*\)(\s*=)?', argument)) is not None:
            parts.append(match[1] + ("=..." if match[2] else ""))
    if not parts and declared:  # bound without names: positional only
        parts = [*declared, "/"]
    elif len([p for p in parts if p != "*"]) != len(declared):
        raise ValueError(f"{name} has {len(declared)} parameters in C++, but its binding names {len(parts)}")
    return {"parameters": ", ".join(parts), "returns": returns}


def declaration(cpp: Sources, name: str) -> tuple[str, list[str]]:
    """(return type, parameter names) of a C++ function."""
    for path in sorted(cpp, key=lambda p: p != "csrc/extensions.h"):
        for found in re.finditer(rf"(?<![\w:.>\"]){name}\s*\(", cpp[path]):
            before = re.search(r"([\w:<>,\s]+)$", cpp[path][: found.start()])
            returns = "" if before is None else " ".join(before[1].split())
            returns = re.sub(r"^(?:static|inline)\s+", "", returns)
            if not returns or returns.split()[-1] in ("return", "else"):
                continue
            parameters = [parameter_name(p) for p in split(inside(cpp[path], found.end() - 1))]
            if all(parameters):
                return returns, parameters
    raise ValueError(f"no declaration of {name} was found")


def parameter_name(text: str) -> str:
    found = re.search(r"(\w+)$", text.partition("=")[0].strip())
    name = "" if found is None else found[1]
    return f"{name}_" if keyword.iskeyword(name) else name


def enum_values(cpp: Sources, name: str) -> dict[str, int]:
    """The values of an enum that Python sees, by name."""
    for text in cpp.values():
        found = re.search(rf'enum_<([\w:]+)>\(\s*\\?\s*m,\s*"{name}"', text)
        if found is not None:
            values = cpp_enum(cpp, found[1].rpartition("::")[2])
            rest = text[found.end() :]
            shown = re.findall(r'\.value\(\s*"(\w+)",[\s\\]*([\w:]+)\)', rest[: end_of_statement(rest)])
            return {shown_name: values[target.rpartition("::")[2]] for shown_name, target in shown}
    raise ValueError(f"no enum {name} was found")


def end_of_statement(text: str) -> int:
    """Where the next enum, class or function begins, or the text ends."""
    following = re.search(r"enum_<|class_<|m\.def\(|#endif", text)
    return len(text) if following is None else following.start()


def cpp_enum(cpp: Sources, name: str) -> dict[str, int]:
    for text in cpp.values():
        found = re.search(rf"\benum\s+(?:class\s+)?{name}\s*(?::\s*\w+\s*)?\{{", text)
        if found is not None:
            values: dict[str, int] = {}
            following = 0
            for item in split(inside(text, found.end() - 1)):
                key, _, value = (part.strip() for part in item.partition("="))
                following = values[value] if value in values else int(value, 0) if value else following
                values[key] = following
                following += 1
            return values
    raise ValueError(f"no C++ enum {name} was found")


if __name__ == "__main__":
    main()

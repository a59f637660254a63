"""What holds for the package as a whole: Keras is left untouched, and imports point downward."""

import ast
import functools
import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "keras_rs_contrib"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up. A module imports from its own level and from those above it in this list.
LEVELS = [
    {"_keras", "arguments", "columns", "interactions", "names", "processes", "scores"},
    {"batch_padding", "distribution", "ids", "metrics", "shared_batches", "vocabulary"},
    {"batches", "tables", "task", "negatives"},
    {"index"},
    {"export"},
    {"model"},
    {"checkpoints"},
    {"__init__"},
]


@pytest.mark.slow
def test_importing_the_package_changes_nothing_in_keras_keras_rs_and_jax():
    script = """
        import sys
        import jax, jax.extend, jax.experimental.sparse, keras, keras_rs
        import keras.src.trainers.data_adapters, keras.src.saving.saving_lib

        def attributes():
            # Of all modules, and of all classes that they define, by the identity of their values.
            found = {}
            for name, module in list(sys.modules.items()):
                if module is None or name.split(".")[0] not in ("jax", "jaxlib", "keras", "keras_rs"):
                    continue
                for key, value in list(vars(module).items()):
                    found[name, key] = value
                    if isinstance(value, type):
                        for attribute, inner in list(vars(value).items()):
                            found[value.__module__, value.__qualname__, attribute] = inner
            return found

        before = attributes()
        import keras_rs_contrib
        after = attributes()
        changed = [key for key, value in before.items() if after.get(key) is not value]
        assert len(before) > 50_000, len(before)
        assert not changed, changed
        classes = {key[:2] for key in before if len(key) == 3}
        new = [key for key in after if key not in before and len(key) == 3 and key[:2] in classes]
        assert not new, new
    """
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_an_optimizer_takes_its_variables_as_an_iterator():
    variable = keras.Variable([1.0])
    keras.optimizers.SGD(1.0).apply([keras.ops.ones(1)], (v for v in [variable]))
    assert variable.numpy() == [0.0]


def names_of_attributes(tree):
    """The names of the attributes and methods that the classes of a module define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    names.add(each.name)
                elif isinstance(each, ast.AnnAssign):
                    names.add(each.target.id)
                elif isinstance(each, ast.Assign):
                    names.update(target.id for target in each.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__setattr__":
            names.update(each.value for each in node.args if isinstance(getattr(each, "value", None), str))
    return names


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def private_names_of_keras():
    """Names that start with an underscore, of the classes of Keras that the package subclasses or is handed."""
    layer = keras.layers.Embedding(2, 2)
    layer.build()
    model = keras.Sequential([layer])
    model.compile("adam", "mse")
    model.fit(np.arange(2), np.zeros((2, 2)), verbose=0)
    metric = keras.metrics.Mean()
    callback = keras.callbacks.Callback()
    objects = [layer, model, layer.embeddings, model.optimizer, metric, callback, keras.losses.MeanSquaredError()]
    return {name for each in objects for name in (*dir(each), *vars(each)) if is_private(name)}


TREES = {path: ast.parse(path.read_text()) for path in MODULES}


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "_keras.py"], ids=lambda path: path.stem)
def test_private_parts_of_keras_are_used_in_one_file(path):
    own = {name for each, tree in TREES.items() if each.name != "_keras.py" for name in names_of_attributes(tree)}
    of_keras = private_names_of_keras()
    used = set()
    for node in ast.walk(TREES[path]):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(module.split(".")[:2] in (["keras", "src"], ["keras_rs", "src"]) for module in modules)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            used.add(node.attr)
    # Named tuples and `sys` have documented names with an underscore.
    used -= {"_asdict", "_replace", "_getframe"}
    # Neither an attribute of Keras, nor an override of one.
    assert used <= own
    assert not (used | {name for name in names_of_attributes(TREES[path]) if is_private(name)}) & of_keras


def test_no_class_of_an_object_is_changed():
    for tree in TREES.values():
        for node in ast.walk(tree):
            assert not (
                isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            )


def test_each_private_use_is_numbered_and_says_what_would_replace_it():
    text = (PACKAGE / "_keras.py").read_text()
    numbers = [int(line.split("#")[1].split(".")[0]) for line in text.splitlines() if line.strip()[:3] in NUMBERED]
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))
    assert max(numbers) < 10
    assert text.count("Replacement:") >= max(numbers) - 1


NUMBERED = {f"# {number}" for number in range(1, 10)}


def level_of(path):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return next(number for number, names in enumerate(LEVELS) if top in names), top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    level, top = level_of(path)
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("keras_rs_contrib"):
            continue
        parts = node.module.split(".")[1:]
        imported = [parts[0]] if parts else [alias.name for alias in node.names]
        for name in imported:
            number = next(number for number, names in enumerate(LEVELS) if name in names)
            assert number <= level
            # Folders of one level do not import one another.
            assert number < level or name == top or level < 2


def test_every_file_is_of_a_page_or_a_few():
    lengths = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert not {name for name, length in lengths.items() if length > 450}

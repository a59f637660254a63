"""Setup of every test: the JAX backend on 8 virtual CPU devices, fixed seeds, and no distribution from other tests.

`JAX_PLATFORMS=cuda` runs the tests on GPUs instead. Those that need more devices than there are, are skipped.
"""

import contextlib
import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Threads of XLA's pool. With one per core, 8 devices that wait for each other in collectives can run out of threads.
os.environ.setdefault("NPROC", "64")

# Most of the time goes into compiling small programs. XLA reads the flags when it starts.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    if os.environ["JAX_PLATFORMS"] == "cpu"
    else os.environ.get("XLA_FLAGS", "")
)

import jax
import keras
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
if os.environ["JAX_PLATFORMS"] != "cpu":
    # The expected values are exact, and a GPU rounds the factors of a product to 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()
# Programs that tests start are to run fast.
del os.environ["XLA_FLAGS"]
# Many tests build the same model again. With this cache, XLA compiles each program once per process. Each process has
# its own directory, because JAX does not write these files atomically.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.utils.set_random_seed(0)
    yield
    keras.distribution.set_distribution(None)
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def first_devices(number: int) -> list[jax.Device]:
    """Returns the first devices. Skips the test if there are fewer."""
    if len(jax.devices()) < number:
        pytest.skip(f"needs {number} devices, and there are {len(jax.devices())}")
    return jax.devices()[:number]


def data_parallel(num_devices: int) -> keras.distribution.DataParallel:
    return keras.distribution.DataParallel(devices=first_devices(num_devices))


def model_parallel(shape: tuple[int, int] = (2, 4), pattern: str = ".*movie.*embeddings", axes=("model", None)):
    """A 2-D mesh that splits batches over the axis `batch`, and matching tables over `axes`."""
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), first_devices(shape[0] * shape[1]))
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[pattern] = axes
    return keras.distribution.ModelParallel(layout_map=layout_map)


DISTRIBUTIONS = {
    "1 device": lambda: None,
    "DataParallel(1)": lambda: data_parallel(1),
    "DataParallel(2)": lambda: data_parallel(2),
    "DataParallel(3)": lambda: data_parallel(3),
    "DataParallel(8)": lambda: data_parallel(8),
    "ModelParallel(2x4)": model_parallel,
    "ModelParallel(1x8)": lambda: model_parallel((1, 8)),
}


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    """Runs the test under each distribution."""
    result = DISTRIBUTIONS[request.param]()
    keras.distribution.set_distribution(result)
    return result


@contextlib.contextmanager
def compilations():
    """Yields a list of what JAX compiles."""
    found = []

    def note(event, duration, **_):
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)

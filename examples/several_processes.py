"""Flags by which the processes of one training find each other, on one machine or on many."""

import os
import sys

import jax
from absl import flags

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "coordinator_address",
    None,
    "Host and port of process 0, such as 127.0.0.1:1234, to train with several processes. Together with "
    "--num_processes and --process_id.",
)
flags.DEFINE_integer("num_processes", None, "Number of processes that train together.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
flags.DEFINE_bool(
    "distributed",
    None,
    "Whether several processes train together. By default, if the flags above are given, or if Keras's environment "
    "variables (KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES, _PROCESS_ID), Slurm, Open MPI, an indexed job of "
    "Kubernetes or a TPU pod say so. With --distributed, JAX finds the processes, or fails.",
)

OF_KERAS = {
    "coordinator_address": "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "num_processes": "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "process_id": "KERAS_DISTRIBUTION_PROCESS_ID",
}
# A process that says nothing for so long counts as lost.
HEARTBEAT_SECONDS = 30
# How long a process that ends waits for the others, which may never come.
SHUTDOWN_SECONDS = 30


def is_one_of_several() -> bool:
    """Returns whether the environment says that this program is one of several processes, as JAX would detect."""
    environment = os.environ
    return (
        (int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", environment.get("TPU_PROCESS_ADDRESSES", ""))
    )


def join() -> None:
    """Joins the other processes, if there are any. Only the first process prints from then on.

    Exits if the flags do not fit together, or the processes do not find each other.
    """
    values = {}
    for name, variable in OF_KERAS.items():
        value = FLAGS[name].value
        values[name] = os.environ.get(variable) if value is None else value
    given = [name for name, value in values.items() if value is not None]
    if 0 < len(given) < len(values):
        missing = ", ".join(f"--{name}" for name in values if name not in given)
        sys.exit(f"--{given[0]}: it needs {missing} too, to train with several processes. Add them.")
    if given:
        try:
            values.update(num_processes=int(values["num_processes"]), process_id=int(values["process_id"]))
        except ValueError as error:
            sys.exit(f"The number of processes, and of this one, must be integers: {error}.")
        values["coordinator_address"] = values["coordinator_address"].split(",")[0]
        if not 0 <= values["process_id"] < values["num_processes"]:
            sys.exit(
                f"--process_id={values['process_id']}: processes are numbered from 0 to {values['num_processes'] - 1}."
            )
    if FLAGS.distributed is False or not (given or FLAGS.distributed or is_one_of_several()):
        return
    try:
        jax.distributed.initialize(
            **values, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        sys.exit(f"The processes have not found each other: {error}")
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def first_devices(number: int | None) -> list[jax.Device]:
    """Returns the first devices of each process.

    Args:
        number: the number of devices of a process, or `None` for all.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        found.setdefault(device.process_index, []).append(device)
    return [device for process in sorted(found) for device in found[process][:number]]

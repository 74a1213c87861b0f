"""The hardware table of `perceiver plan`: devices, their rates and prices. Users can copy and edit it."""

import difflib
from pathlib import Path

from pydantic import Field

from cluster.recipe.file import read_yaml_config
from perceiver.config import Config, Count, NonNegative, Positive, Real, UserError

BUILT_IN = Path(__file__).with_name("hardware.yaml")


class Device(Config):
    """One GPU (or CPU core) and its share of its node. Rates are per device."""

    title: str = Field(description="name for users")
    match: str = Field(description="part of the device name that the machine reports; for calibrations")
    bf16_tflops: Positive = Field(description="peak of dense bfloat16 products, 10^12 FLOP/s")
    fp32_tflops: Positive = Field(description="peak of dense float32 products, 10^12 FLOP/s")
    tf32_tflops: Positive | None = Field(
        default=None, description="peak of dense TF32 products, 10^12 FLOP/s; none: fp32_tflops"
    )
    efficiency: Real = Field(default=0.45, gt=0, le=1, description="share of the peak that products reach")
    kernel_efficiency: Real = Field(
        default=0.34, gt=0, le=1, description="share of fp32_tflops that the separable kernel reaches (an H200: 0.34)"
    )
    memory_gb: Positive = Field(description="device memory, 10^9 bytes")
    memory_gbytes_s: Positive = Field(description="memory bandwidth, 10^9 bytes/s")
    memory_efficiency: Real = Field(default=0.8, gt=0, le=1, description="share of it that elementwise work reaches")
    launch_us: Positive = Field(
        default=10.0, description="time in which the host launches an operation, microseconds: a fast host's"
    )
    context_gb: Positive = Field(default=1.5, description="memory of libraries and allocator before a model")
    link_gbytes_s: Positive = Field(description="to another device of the node, one direction, 10^9 bytes/s")
    network_gbytes_s: Positive = Field(description="to another node, per device, 10^9 bytes/s each way")
    devices_per_node: Count = Field(description="devices per node")
    node_cpus: Count = Field(description="CPU cores (as Ray counts them) per node")
    price_hour: NonNegative = Field(description="price per device and hour, on demand")
    price_hour_spot: NonNegative = Field(description="price per device and hour, preemptible")


class Hardware(Config):
    """The table of devices."""

    devices: dict[str, Device] = Field(min_length=1, description="devices by the name that --gpu takes")

    def device(self, name: str) -> Device:
        """Return the device of a name.

        Raises:
            UserError: the table has no such device.
        """
        if name not in self.devices:
            near = difflib.get_close_matches(name, self.devices, 1)
            hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(self.devices)}"
            raise UserError(f"--gpu {name}: {hint}; other devices can be described in a file given with --hardware")
        return self.devices[name]


def load_hardware(path: str | None) -> Hardware:
    """Read the user's table, or the built-in one without a path.

    Raises:
        UserError: no such file, broken YAML, or a wrong key or value.
    """
    file = Path(path) if path else BUILT_IN
    if not file.is_file():
        raise UserError(f"--hardware {path}: no such file; wanted a table like {BUILT_IN}")
    return read_yaml_config(file, Hardware)

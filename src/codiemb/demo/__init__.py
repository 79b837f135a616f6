"""A small world written for this project, with the configuration that `codiemb demo` runs. See README.md beside it."""

from pathlib import Path

CONFIG = Path(__file__).with_name("config.yaml")

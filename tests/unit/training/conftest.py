"""The small model, rows and recipe of the fine-tuning tests."""

from tests.unit.finetune.conftest import finetune, model, rows  # noqa: F401

"""The models of the tests of TRL's trainers."""

from pathlib import Path

import pytest

from tests.trl.trl_cases import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder

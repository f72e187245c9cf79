"""transformers' common tests of models, configurations and image processors, on our classes.

They are not in the wheel: the sdist of the installed version is downloaded, its test mixins are unpacked into a
temporary folder, and `common_suite.py` runs there in a pytest of its own. Nothing of theirs is kept.
"""

import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

pytestmark = pytest.mark.network

REPOSITORY = Path(__file__).resolve().parents[2]

# What the mixins import and the sdist leaves out (5.17 to 5.23). The configuration's own arguments are ours to choose.
STUBS = {
    "tests/__init__.py": "",
    "tests/models/__init__.py": "",
    "tests/models/vit_scratch/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16', "
        "'architectures': ['ViTScratchModel'], 'id2label': {0: 'label'}, 'label2id': {'label': 0}, "
        "'problem_type': 'regression', 'chunk_size_feed_forward': 5, 'is_encoder_decoder': True}\n"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def download_sdist(folder: Path) -> Path:
    """The sdist of the installed transformers, in `folder`; skips the tests where it cannot be had."""
    requirement = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", requirement, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"the sdist of {requirement} cannot be downloaded: {last_words}")
    return next(folder.glob("transformers-*.tar.gz"))


def unpack_mixins(sdist: Path, folder: Path):
    """Writes the sdist's `tests/*.py`, the stubs and our suite into `folder`, as a package that imports itself."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = re.fullmatch(r"[^/]+/(tests/\w+\.py)", member.name)
            if name and member.isfile():
                target = folder / name[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    suite = Path(__file__).with_name("common_suite.py").read_text()
    for name, text in {**STUBS, "tests/models/vit_scratch/test_common.py": suite}.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture(scope="module")
def mixins(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers_tests")
    unpack_mixins(download_sdist(tmp_path_factory.mktemp("sdist")), folder)
    return folder


def run_suite(folder: Path, test_class: str) -> tuple[int, int, list[str]]:
    """(passed, skipped, failures with their first line) of one class of the suite, run in a fresh process."""
    report = folder / f"{test_class}.xml"
    test_file = "tests/models/vit_scratch/test_common.py"
    # an ini file of its own, so that no setting of a folder above is taken
    options = ["-q", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RUN_SLOW": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", *options, f"{test_file}::{test_class}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert report.exists(), f"pytest did not start:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        trouble = [child for child in case if child.tag in ("failure", "error")]
        failures += [f"{case.get('name')}: {(child.get('message') or '').splitlines()[:1]}" for child in trouble]
        is_skipped = case.find("skipped") is not None
        skipped += is_skipped
        passed += not trouble and not is_skipped
    counts = f"{passed} passed, {skipped} skipped, {len(failures)} failed"
    print(f"{test_class}, transformers {transformers.__version__}: {counts}")
    assert done.returncode in (0, 1), done.stdout[-2000:]
    return passed, skipped, failures


@pytest.mark.parametrize(
    ("test_class", "least_passed"),
    [("PlainModelTest", 90), ("EveryOptionModelTest", 90), ("ConfigurationTest", 1), ("ImageProcessorTest", 17)],
)
def test_transformers_common_tests_pass(mixins, test_class, least_passed):
    """The least number keeps a run in which nearly all is skipped from counting as a success."""
    passed, _, failures = run_suite(mixins, test_class)
    assert not failures, "\n".join(failures)
    assert passed >= least_passed


def test_a_common_test_that_fails_is_seen(mixins):
    passed, _, failures = run_suite(mixins, "WrongConfigurationTest")
    assert passed == 0
    assert len(failures) == 1 and "vocab_size" in failures[0]

"""The drawings of the documentation are what their scripts draw from the data beside them."""

import importlib
import re
import shutil
import sys

import matplotlib
import numpy as np
import pytest
from blocks import ROOT

FOLDER = ROOT / "docs" / "figures"
NAMES = sorted(file.stem for file in FOLDER.glob("*.svg"))
PIXEL = 0.5  # what a drawing may differ by: arithmetic is not the same to the bit everywhere


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def words_and_numbers(file):
    """What a drawing says, and where its lines go."""
    text = re.sub(r"<metadata>.*?</metadata>", "", file.read_text(encoding="utf-8"), flags=re.S)
    words = re.findall(r"<text[^>]*>([^<]*)<|<tspan[^>]*>([^<]*)<", text)
    paths = " ".join(re.findall(r' (?:d|transform|x|y)="([^"]*)"', text))
    return words, np.array(re.findall(r"-?\d+\.?\d*", paths), float)


def same(ours, theirs):
    (words, numbers), (other_words, other_numbers) = map(words_and_numbers, (ours, theirs))
    if words != other_words or numbers.shape != other_numbers.shape:
        return False
    return bool(np.all(np.abs(numbers - other_numbers) <= PIXEL))


def drawn_by_this_matplotlib():
    creator = f"Matplotlib v{matplotlib.__version__.rsplit('.', 1)[0]}."
    return all(creator in (FOLDER / f"{name}.svg").read_text(encoding="utf-8") for name in NAMES)


def test_there_is_a_script_for_each_and_the_documentation_shows_it():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert NAMES
    for name in NAMES:
        assert (FOLDER / f"{name}.py").is_file()
        assert f"(figures/{name}.svg)" in pages


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_is_what_its_script_draws(name, script, tmp_path):
    script(name).draw(tmp_path)
    if not drawn_by_this_matplotlib():
        assert (tmp_path / f"{name}.svg").stat().st_size > 5_000
        pytest.skip(f"another Matplotlib ({matplotlib.__version__}) places things elsewhere")
    assert same(tmp_path / f"{name}.svg", FOLDER / f"{name}.svg")


@pytest.mark.parametrize("name", NAMES)
def test_it_has_no_date_and_no_background(name):
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in text
    assert "#ffffff" not in text


def test_other_data_are_another_drawing(script, tmp_path, monkeypatch):
    home = script("home")
    monkeypatch.setattr(home, "LAYERS", 32)
    home.draw(tmp_path)
    assert not same(tmp_path / "home.svg", FOLDER / "home.svg")
    shutil.copy(FOLDER / "home.svg", tmp_path / "copy.svg")
    assert same(tmp_path / "copy.svg", FOLDER / "home.svg")


def test_a_byte_of_a_page_belongs_to_one_token(script):
    from vllm_metal_tq.config import TurboQuantConfig
    from vllm_metal_tq.layout import PageLayout

    page = script("page")
    layout = PageLayout(TurboQuantConfig(3, 3), 128)
    part, token = page.owners(layout)
    assert np.bincount(token).tolist() == [layout.row_bytes] * 16
    assert np.bincount(part).tolist() == [n * 16 for n in (*layout.plane_bytes, 4)]
    starts, lengths = page.runs(token == 5)
    assert lengths.sum() == layout.row_bytes
    assert len(starts) == len(lengths)


@pytest.mark.slow
def test_the_data_are_the_demo_models(script, demo):
    fresh = script("capture").capture(*demo)
    with np.load(FOLDER / "keys.npz") as kept:
        assert set(kept) == set(fresh)
        for name, array in fresh.items():
            scale = np.abs(array.astype(np.float64)).max()
            assert np.abs(array.astype(np.float64) - kept[name]).max() <= 0.01 * scale


def test_the_best_schemes_of_a_budget_are_the_drawn_ones(script):
    schemes = script("schemes")
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\d\.\d\d) \| [^|]* \| (\.\d+) \| [^|]* \| (\.\d+) \|", page, re.MULTILINE
    )
    assert len(rows) > 10
    for budget, *kls in rows:
        fit = [point for point in schemes.points() if point["bits"] <= float(budget) + 0.005]
        for ours, kl in zip((True, False), kls, strict=True):
            best = min(p["kl"] for p in fit if (p["family"] == schemes.OURS) is ours)
            assert f"{best:.{len(kl) - 1}f}".lstrip("0") == kl, budget

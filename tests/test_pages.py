"""The pages, as a browser shows them: nothing fetched, nothing broken, readable on a phone and in the dark."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from conftest import COLOURS, Toy, draw
from features import backbones, forward
from features.backbones import Backbone
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from pipeline import charts
from pipeline.dataset import Selection
from pipeline.metrics import Predictions
from pipeline.train import train

NASTY = '<b>a&b\'s "$x$" <img src=x onerror=alert(1)>'
PHONE = 375


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, where it is installed."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium is installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found[0], args=options)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a file as a window of some width; what it says, and asks of any network, is asserted to be nothing."""
    opened: list[tuple[Page, list[str]]] = []

    def visit(path: Path, width: int = 1200, scheme: str = "light") -> Page:
        page, odd = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), list[str]()
        page.on("console", lambda message: odd.append(message.text))
        page.on("pageerror", lambda error: odd.append(f"{error}"))
        page.on(
            "request", lambda asked: odd.append(asked.url) if not asked.url.startswith(("data:", "file:")) else None
        )
        page.goto(path.as_uri())
        opened.append((page, odd))
        return page

    yield visit
    for page, odd in opened:
        page.close()
        assert odd == []


@pytest.fixture
def store(photos: Path, tmp_path: Path, toy: Toy) -> FeatureStore:
    (photos / "train/red").rename(photos / "train" / NASTY)
    (photos / "test/red").rename(photos / "test" / NASTY)
    (photos / "train/blue/same.png").write_bytes((photos / "train/green/01.png").read_bytes())
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    return store


LOOSE = Selection(near_duplicates=False)


def loaded(page: Page) -> int:
    """How many images there are; all of them have pixels."""
    widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    assert 0 not in widths
    return len(widths)


def luminance(page: Page, what: str, which: str = "body") -> float:
    colour = page.eval_on_selector(which, f"element => getComputedStyle(element).{what}")
    return float(np.mean([int(value) for value in re.findall(r"\d+", colour)[:3]]))


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_a_report_in_a_browser(store: FeatureStore, tmp_path: Path, visit: Callable[..., Page]) -> None:
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    assert "seed" in (tmp_path / "bundle/MODEL_CARD.md").read_text()
    page = visit(tmp_path / "bundle/report.html")
    assert loaded(page) >= 2 and fits(page)
    words = page.inner_text("body")
    assert NASTY in words and "clearly beats" in words and "same bytes" in words
    assert f"snapshot\n{facts['snapshot']['number']} of" in words and "permafrost train" in words
    assert page.locator("figure svg").count() >= 5 and page.locator(".map circle").count() == 25
    assert page.locator(".tip").is_hidden()
    page.locator(".map circle").first.hover(force=True)
    tile = page.locator(".tip .tile")
    assert page.locator(".tip").is_visible() and "data:image/webp" in tile.evaluate("e => e.style.backgroundImage")
    assert ".png" in page.locator(".tip").inner_text()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and luminance(page, "backgroundColor") == 255
    assert page.pdf()[:4] == b"%PDF"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_on_a_phone(store: FeatureStore, tmp_path: Path, visit: Callable[..., Page], scheme: str) -> None:
    train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3, head="knn")
    page = visit(tmp_path / "bundle/report.html", PHONE, scheme)
    assert fits(page)
    paper, ink = luminance(page, "backgroundColor"), luminance(page, "color")
    drawn = luminance(page, "fill", "figure svg text")
    assert (paper > 240 and ink < 60) if scheme == "light" else (paper < 40 and ink > 200)
    assert abs(drawn - ink) < 30, "text in charts has the page's colour"
    assert float(page.eval_on_selector("body", "e => getComputedStyle(e).fontSize")[:-2]) >= 14
    page.locator(".map circle").first.click(force=True)
    assert page.locator(".tip").is_visible() and fits(page)


def test_quantities_and_heads_without_probabilities(
    store: FeatureStore, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    listing = store.snapshot().samples.to_pandas()
    weights = listing["bytes"] * 1.5 + np.arange(len(listing))
    table = pd.DataFrame({"id": listing["id"], "weight": weights, "kind": listing["label"]})
    table.to_csv(tmp_path / "labels.csv", index=False)
    selection = Selection(labels=str(tmp_path / "labels.csv"), near_duplicates=False)
    train(store, ["weight", "kind"], tmp_path / "several", selection=selection, folds=2, head="linear_svm")
    page = visit(tmp_path / "several/report.html")
    assert {"weight", "kind"} <= set(page.locator("h2").all_inner_texts())
    assert page.get_by_text("Their errors.").count() == 1 and page.locator(".key span").count() == 4
    errors = pd.read_parquet(tmp_path / "several/label_errors.parquet")
    assert errors.groupby("target").size().to_dict() == {"kind": 25, "weight": 25}
    assert errors.loc[errors["target"] == "kind", "p_label"].between(0, 1).all()


def test_images_that_are_gone_or_not_wanted(store: FeatureStore, tmp_path: Path, visit: Callable[..., Page]) -> None:
    train(store, "label", tmp_path / "without", selection=LOOSE, folds=3, with_images=False)
    page = visit(tmp_path / "without/report.html")
    assert loaded(page) == 0 and page.get_by_text("not readable").count() == 0
    page.locator(".map circle").first.hover(force=True)
    assert page.locator(".tip .tile").is_hidden() and ".png" in page.locator(".tip").inner_text()
    listing = store.snapshot().samples.to_pandas()
    for uri in listing["uri"]:
        draw(Path(uri), COLOURS["red"])
    train(store, "label", tmp_path / "gone", selection=LOOSE, folds=3)
    page = visit(tmp_path / "gone/report.html")
    assert loaded(page) == 0 and page.get_by_text("not readable").count() > 0


def test_the_same_facts_in_json_and_in_the_card(store: FeatureStore, tmp_path: Path) -> None:
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    told = json.loads((tmp_path / "bundle/report.json").read_text())
    assert told["targets"] == facts["targets"] and told["verdict"]
    counts = pd.DataFrame(told["confused"]["label"], columns=["truth", "predicted", "count"])
    assert counts["count"].sum() == facts["targets"][0]["rows"]["train"]
    assert told["problems"] == facts["problems"] and len(told["listed"]["near_duplicates"]) == 1
    card = (tmp_path / "bundle/MODEL_CARD.md").read_text()
    assert told["verdict"] in card and told["command"] in card
    assert "| &lt;b>a&b's" in card and "{{" not in card and "\n\n\n" not in card


def test_a_comparison_and_a_look(
    store: FeatureStore, tmp_path: Path, visit: Callable[..., Page], permafrost: Callable[..., Any]
) -> None:
    page_of_it = tmp_path / "board.html"
    asked = ("compare", tmp_path / "store", "--target", "label", "--folds", 3, "--heads", "logreg,knn", "--html")
    permafrost(*asked, page_of_it, "--split-near-duplicates")
    page = visit(page_of_it, PHONE)
    assert fits(page) and page.locator("tbody tr").count() == 2 and page.locator("figure svg").count() == 1
    nowhere = permafrost(*asked, tmp_path / "nowhere/x.html", code=2)
    assert "for --html is not there; make it first" in nowhere.stderr and "folds" not in nowhere.stderr
    permafrost("explore", tmp_path / "store", "--out", tmp_path / "look")
    page = visit(tmp_path / "look/report.html", PHONE, "dark")
    assert fits(page) and loaded(page) >= 9 and luminance(page, "backgroundColor") < 40
    assert page.get_by_text("25 images in").count() == 1


def test_text_that_means_something_to_a_drawing_program() -> None:
    y = np.arange(40) % 2
    found = Predictions(y, y, np.eye(2)[y], None, np.array(["$\\frac{1}{", NASTY]))
    drawn = charts.svg(charts.confusion(found))
    assert "$\\frac{1}{" in drawn and "&lt;b&gt;" in drawn and "<b>" not in drawn


@pytest.mark.slow
def test_a_thousand_classes_of_fifty_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Toy, visit: Callable[..., Page]
) -> None:
    """Under 10 MB, and open in under 3 s."""

    class Grid(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
            return (batch.float().flatten(1) / 255,)

    def load(requests: list[Any], *_: Any) -> Backbone:
        specs = [{"backbone": "toy", "weights": "V1", "layer": "grid", "decode": 1}]
        run = forward.Forward(Grid(), torch.device("cpu"), forward.BATCH["cpu"])
        return Backbone(specs, [48], "fp32", lambda image: np.asarray(image.resize((4, 4), Image.Resampling.BOX)), run)

    monkeypatch.setattr(backbones, "load", load)
    random = np.random.default_rng(0)
    usual = random.integers(0, 256, (1000, 4, 4, 3))
    for number in range(50_000):
        path = tmp_path / f"images/class {number % 1000:03d}/{number:05d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(usual[number % 1000] + random.normal(0, 90, (4, 4, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((24, 24, 1), np.uint8))).save(path)
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(tmp_path / "images")), store, [toy.request])
    begun = time.monotonic()
    train(store, "label", tmp_path / "bundle", folds=2, head="knn", selection=LOOSE)
    report = tmp_path / "bundle/report.html"
    print(f"trained in {time.monotonic() - begun:.0f} s, {report.stat().st_size / 1e6:.2f} MB")
    assert report.stat().st_size < 10e6
    begun = time.monotonic()
    page = visit(report)
    assert page.locator(".map circle").count() == 1000
    loaded(page)
    print(f"open in {time.monotonic() - begun:.2f} s")
    assert page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 3000
    assert time.monotonic() - begun < 3

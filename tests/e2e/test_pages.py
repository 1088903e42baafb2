"""The page of a sweep in a browser: headless Chromium, where one is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from playwright.sync_api import Page, sync_playwright
from sweep_folders import leave_run

from cosmos3_pipeline import report
from cosmos3_pipeline.jobs import sweep

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
JOBS, FRAMES, SIZE = 3, 24, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three videos in which a bar moves, a little further right in each, and of a job that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    started = sweep.start(folder, baseline=0)
    for number in range(JOBS):
        place = folder / str(number)
        leave_run(place, 0, str(number), seconds=float((2, 10, 9)[number]), picture="video.mp4")
        with av.open(str(place / "video.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
            for frame in range(FRAMES):
                picture = np.zeros((SIZE, SIZE, 3), np.uint8)
                picture[:, frame + 8 * number : frame + 8 * number + 4] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        (place / "config.yaml").write_text(f"sampler: {{seed: {number}}}\n")
        sweep.record(folder, number, [f"sampler.seed={number}"], place, "generate", None)
    sweep.record(folder, JOBS, ["sampler.seed=9"], folder / "3", "generate", RuntimeError("the disk is full"))
    started.report()
    sweep.current = None
    report.sweep_page(folder)
    return folder


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "narrow"])
def page(folder: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, opened; the test fails where the browser complains or asks a network."""
    width, scheme = request.param
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.set_default_timeout(120_000)
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url[:80])
        )
        opened.goto((folder / "index.html").as_uri())
        opened.wait_for_function("videos.every((video) => video.readyState >= 2)")
        yield opened
        browser.close()
    assert not complaints


@pytest.mark.sampled(1)
def test_it_fits_the_window_and_shows_every_job(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#jobs tbody tr").count() == JOBS + 1
    assert page.locator("video").count() == JOBS and page.locator(".plot svg").count() == 3
    assert "the disk is full" in page.locator(".reason").inner_text()
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"{style}.color != {style}.backgroundColor")


@pytest.mark.sampled(1)
def test_a_click_sorts_by_a_column_as_numbers(page: Page) -> None:
    def order() -> list[str]:
        return page.locator("#jobs tbody tr td:first-child").all_inner_texts()

    head = page.locator("#jobs th button", has_text="total s")
    head.click()
    assert order() == ["0", "2", "1", "3"]
    head.click()
    assert order() == ["1", "2", "0", "3"]


def test_videos_are_in_step_and_enlarged_together(page: Page) -> None:
    page.locator("#time").evaluate("(time) => { time.value = 0.5; time.dispatchEvent(new Event('input')); }")
    page.wait_for_function("videos.every((video) => !video.seeking)")
    assert page.evaluate("videos.map((video) => video.currentTime)") == [0.5] * JOBS
    page.locator("#play").click()
    page.wait_for_function("videos[0].currentTime > 0.6")
    page.evaluate("stop()")
    page.wait_for_function("videos.every((video) => !video.seeking)")
    times = page.evaluate("videos.map((video) => video.currentTime)")
    assert max(times) - min(times) < 1 / 48 and page.locator("#play").inner_text() == "play"
    page.locator("#zoom").evaluate("(zoom) => { zoom.value = 4; zoom.dispatchEvent(new Event('input')); }")
    wide = page.evaluate("videos.map((video) => new DOMMatrix(getComputedStyle(video).transform).a)")
    assert wide == [4] * JOBS


@pytest.mark.sampled(1)
def test_the_difference_of_two_jobs_is_where_they_differ(page: Page, tmp_path: Path) -> None:
    page.evaluate("seek(0)")
    page.wait_for_function("videos.every((video) => !video.seeking)")
    page.select_option("#one", "0")
    page.select_option("#other", "2")
    page.evaluate("drawDifference()")
    bright = reds(page) > 128
    assert bright[:4].all() and bright[16:20].all() and bright.sum() <= 10
    page.select_option("#other", "0")
    page.evaluate("drawDifference()")
    assert reds(page).max() == 0


def reds(page: Page) -> np.ndarray:
    """The red values of row 8 of the difference."""
    row = "Array.from(canvas.getContext('2d').getImageData(0, 8, 64, 1).data)"
    return np.array(page.evaluate(row)).reshape(-1, 4)[:, 0]


@pytest.mark.sampled(1)
def test_any_two_configs_are_compared(page: Page) -> None:
    page.select_option("#from", "2")
    page.select_option("#to", "1")
    assert "sampler.seed: 2 -> 1" in page.locator("#diff").inner_text()
    page.select_option("#to", "3")
    assert "not compared" in page.locator("#diff").inner_text()

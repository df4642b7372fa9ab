"""The page in a headless Chromium that reaches this machine alone; skipped aloud where there is none."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sparse_ref_attn.app.serve import check_place, launch
from sparse_ref_attn.app.session import Session

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="no chromium and chromedriver on this machine"),
    pytest.mark.skipif(None in map(find_spec, ("gradio", "selenium")), reason="no gradio, or no selenium"),
]
PHONE, DESK = (360, 780), (1280, 900)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    session = Session()
    session.load()
    page, address = launch(session, "127.0.0.1", check_place("127.0.0.1", None))
    yield address
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    """What `found` finds, once it finds anything."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if value := found():
                return value
        except WebDriverException:  # not there yet, or made anew meanwhile
            pass
        assert time.monotonic() < end, "the page did not come to show it"
        time.sleep(0.1)


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def said(browser: Any) -> str:
    return one(browser, "#said").text


def size(browser: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def opened(browser: Any, address: str, of: tuple[int, int] = DESK) -> None:
    size(browser, *of)
    browser.get(address)
    until(lambda: "loaded on cpu" in said(browser) and one(browser, "#edit").is_displayed())


def drawn(browser: Any) -> None:
    """An example of the small model is in the fields."""
    until(lambda: one(browser, "#draw").is_displayed())
    one(browser, "#draw").click()
    until(lambda: one(browser, "#prompt textarea").get_attribute("value").startswith("place"))


def edited(browser: Any) -> str:
    one(browser, "#edit").click()
    until(lambda: one(browser, "#sparse img"))
    until(lambda: "patched with" in said(browser))
    return said(browser)


def test_edit_dense_beside_it_and_undo(browser: Any, address: str) -> None:
    opened(browser, address)
    one(browser, "#edit").click()
    until(lambda: said(browser) == "There must be a photo, got none: drop one in.")
    drawn(browser)
    assert edited(browser).endswith("patched with balanced.")
    assert "stored keys and values" in until(lambda: one(browser, "#numbers table").text)
    assert until(lambda: one(browser, "#kept img")).is_displayed()
    assert not browser.find_elements("css selector", "#dense img")
    one(browser, "#undo").click()
    until(lambda: said(browser).endswith("as it is: no patch."))
    one(browser, "#beside").click()
    until(lambda: one(browser, "#dense img"))
    assert "the bound of the whole call" in until(lambda: one(browser, "#numbers table").text)
    sources = [one(browser, f"#{name} img").get_attribute("src") for name in ("sparse", "dense")]
    assert sources[0] != sources[1]


def test_a_photo_of_ones_own_and_an_error_in_the_page(browser: Any, address: str, tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((90, 160, 3), 200, np.uint8)).save(tmp_path / "photo.png")
    opened(browser, address)
    one(browser, "#photos input[type=file]").send_keys(str(tmp_path / "photo.png"))
    until(lambda: one(browser, "#photos img"))
    one(browser, "#prompt textarea").send_keys("on a beach")
    one(browser, "#edit").click()
    until(lambda: "knows the words of its own task alone, got on a beach" in said(browser))
    assert "Traceback" not in browser.page_source


def test_a_phone_needs_no_sideways_scrolling_and_sees_what_came_of_it(browser: Any, address: str) -> None:
    opened(browser, address, PHONE)
    wide, high = PHONE

    def in_sight(name: str) -> bool:
        place = browser.execute_script(
            "const box = document.getElementById(arguments[0]).getBoundingClientRect(); return [box.top, box.bottom]",
            name,
        )
        return -1 <= place[0] < place[1] <= high + 1

    one(browser, "#edit").click()
    until(lambda: said(browser).startswith("There must be a photo") and in_sight("said"))
    drawn(browser)
    edited(browser)
    until(lambda: one(browser, "#numbers table") and in_sight("sparse"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= wide


def test_nothing_is_asked_of_another_machine(browser: Any, address: str) -> None:
    opened(browser, address)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in asked)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome"))] == []
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []

"""A headless Chromium on a Gradio page: boxes by their labels, buttons by their texts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class GradioPage:
    """What a user does on a page. A picture of it is kept in `folder` when something does not appear in time."""

    def __init__(self, driver: Any, folder: Path):
        self.driver, self.folder = driver, folder

    def wait(self, what: str, look: Callable[[], T], seconds: float = 120) -> T:
        """The first true value of `look`, which may raise while the page is not there yet, but no AssertionError."""
        end, error = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            try:
                if value := look():
                    return value
            except AssertionError:
                raise
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
            time.sleep(0.3)
        picture = self.folder / "page.png"
        self.driver.save_screenshot(str(picture))
        raise AssertionError(f"no {what} after {seconds:g} s; picture in {picture}; {error}")

    def fill(self, label: str, text: str, *, choose: bool = False) -> None:
        """Write into the visible box with this label; `choose`: it is a list, of which `text` is taken."""
        keys = _selenium("webdriver.common.keys").Keys
        path = f'//*[@data-testid="block-info" and normalize-space()="{label}"]/..'
        slider = f'//input[@aria-label="number input for {label}"]'
        field = self.wait(f"box {label}", lambda: self._visible(f"({path}//textarea|{path}//input|{slider})"))
        field.click()
        field.send_keys(keys.CONTROL, "a")
        field.send_keys(keys.DELETE)
        field.send_keys(text)
        time.sleep(0.5)  # the list follows what is typed
        field.send_keys(keys.ENTER if choose else keys.TAB)
        time.sleep(0.5)

    def press(self, text: str) -> None:
        """Press the visible button with this text."""
        self.wait(f"button {text}", lambda: self._visible(f'//button[normalize-space()="{text}"]')).click()

    def open(self, text: str) -> None:
        """Unfold an accordion."""
        self.wait(text, lambda: self._visible(f'//button[.//span[normalize-space()="{text}"]]')).click()

    def text(self) -> str:
        """All that can be read, in boxes too."""
        script = "return [...document.querySelectorAll('textarea')].map(box => box.value).join('\\n')"
        return f"{self.driver.find_element('tag name', 'body').text}\n{self.driver.execute_script(script)}"

    def _visible(self, path: str) -> Any:
        return next(e for e in self.driver.find_elements("xpath", path) if e.is_displayed())


@contextmanager
def open_page(url: str, folder: Path) -> Iterator[GradioPage]:
    """The page in a browser of its own; skips the test by name where there is none."""
    chromium = next(filter(None, map(shutil.which, PROGRAMS)), None)
    driver_program = shutil.which("chromedriver")
    if chromium is None or driver_program is None:
        pytest.skip("no chromium and chromedriver on this machine")
    webdriver = _selenium("webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,2600"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    try:
        driver.get(url)
        yield GradioPage(driver, folder)
    finally:
        driver.quit()


def _selenium(name: str) -> Any:
    return pytest.importorskip(f"selenium.{name}", reason="selenium is not installed")

"""A headless Chromium that looks at a page as a person would: at a width, in light or dark."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

# What a reader would stumble over. Colours are blended over what lies behind them; text in closed <details> or clipped
# for screen readers is not seen.
FACTS = """
const parse = text => {
  const found = text.match(/[\\d.]+/g).map(Number);
  return {r: found[0], g: found[1], b: found[2], a: found.length > 3 ? found[3] : 1};
};
const over = (top, below) => ({
  r: top.r * top.a + below.r * (1 - top.a), g: top.g * top.a + below.g * (1 - top.a),
  b: top.b * top.a + below.b * (1 - top.a), a: 1,
});
const luminance = colour => {
  const part = value => { value /= 255; return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
  return 0.2126 * part(colour.r) + 0.7152 * part(colour.g) + 0.0722 * part(colour.b);
};
const behind = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? {r: 18, g: 18, b: 18} : {r: 255, g: 255, b: 255};
  return layers.reverse().reduce((below, top) => over(top, below), canvas);
};
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest(".unseen")) continue;
  const style = getComputedStyle(element);
  const back = behind(element), front = over(parse(style.color), back);
  const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
  texts.push({text: text.slice(0, 60), contrast: (high + 0.05) / (low + 0.05), size: parseFloat(style.fontSize)});
}
const root = document.documentElement;
return {
  scroll_width: root.scrollWidth,
  inner_width: window.innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  background: getComputedStyle(document.body).backgroundColor,
  body_font: parseFloat(getComputedStyle(document.body).fontSize),
  texts: texts,
  images: [...document.images].map(image => ({
    natural: image.naturalWidth, shown: image.getBoundingClientRect().width, alt: image.alt,
    source: `${image.currentSrc.length} ${image.currentSrc.slice(-40)}`,
  })),
  targets: [...document.querySelectorAll("nav a, summary")].filter(element => element.checkVisibility())
    .map(element => element.getBoundingClientRect().height),
};
"""


def missing_browser() -> str | None:
    """Returns why there is no browser to test with, or None if there is one."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed"
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} on this machine (Debian: chromium, chromium-driver)" if lacking else None


@dataclass(frozen=True)
class Look:
    """What was found on a page.

    Attributes:
        facts: what the page says of itself, see FACTS.
        console: warnings and errors.
        requests: every address that was asked for.
    """

    facts: dict[str, Any]
    console: list[str]
    requests: list[str]


class Browser:
    """One Chromium for many pages."""

    def __init__(self, profile: Path) -> None:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self._driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))

    def look(self, page: Path, *, width: int, height: int, dark: bool, picture: Path | None = None) -> Look:
        """Opens a page as on a screen of this size in CSS pixels; writes what is to be seen to `picture`."""
        driver = self._driver
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("performance", "browser"):
            driver.get_log(kind)  # those of the page before
        driver.get(page.as_uri())
        facts = driver.execute_script(FACTS)
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        requests = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        console = [entry["message"] for entry in driver.get_log("browser")]
        if picture is not None:
            self._photograph(picture, width)
        return Look(facts, console, requests)

    def close(self) -> None:
        """Ends the browser and its driver."""
        self._driver.quit()

    def _photograph(self, picture: Path, width: int) -> None:
        height = self._driver.execute_script("return document.documentElement.scrollHeight")
        area = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": area}
        shot = self._driver.execute_cdp_cmd("Page.captureScreenshot", options)
        picture.write_bytes(base64.b64decode(shot["data"]))

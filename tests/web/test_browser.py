"""The shop of examples/web in Chromium. `nox -s browser` runs these tests.

If Chromium does not start, the tests are skipped; in CI they fail.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.shop import Shop, shop

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

playwright: Any = pytest.importorskip(
    "playwright.sync_api", reason="the group `browser` is not installed: nox -s browser"
)
expect = playwright.expect
pytestmark = pytest.mark.slow

PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) Version/18.0 Mobile Safari/604.1"
# Four additions at once, in the background of the page.
ADD = """() => {
    const add = () => fetch("/cart/lemons", {method: "POST"});
    window.added = Promise.all([add(), add(), add(), add()]);
}"""
STATUSES = "() => window.added.then(answers => answers.map(answer => answer.status))"


@pytest.fixture(scope="module", name="running")
def running_shop() -> Iterator[Shop]:
    """The shop, for all tests."""
    with shop() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium: the one on PATH, or the one that playwright has installed."""
    names = "chromium", "chromium-browser", "google-chrome"
    path = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as drivers:
        try:
            browser = drivers.chromium.launch(executable_path=path)
        except playwright.Error as error:
            reason = str(error).splitlines()[0]
            message = (
                f"Chromium does not start; `playwright install chromium` installs it: {reason}"
            )
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        yield browser
        browser.close()


@pytest.fixture
def laptop(browser: "Browser", running: Shop) -> Iterator["BrowserContext"]:
    """A browser without cookies."""
    with browser.new_context(base_url=running.url) as context:
        yield context


@pytest.fixture
def phone(browser: "Browser", running: Shop) -> Iterator["BrowserContext"]:
    """Another browser without cookies."""
    with browser.new_context(base_url=running.url, user_agent=PHONE) as context:
        yield context


def opened(context: "BrowserContext") -> "Page":
    """A new tab with the shop."""
    tab = context.new_page()
    tab.goto("/")
    return tab


def sign_in(tab: "Page", name: str) -> None:
    """Sign in with the form, as a user does."""
    tab.get_by_role("link", name="Sign in").click()
    tab.get_by_label("Name").fill(name)
    tab.get_by_role("main").get_by_role("button", name="Sign in").click()
    expect(tab.locator(".user")).to_have_text(name)


def cookie(context: "BrowserContext") -> Any:
    """The only cookie."""
    (found,) = context.cookies()
    return found


def test_reading_sets_no_cookie(laptop: "BrowserContext") -> None:
    """Nothing is stored for a visitor who only reads."""
    expect(opened(laptop).locator("#digest")).to_contain_text("none")
    assert laptop.cookies() == []


def test_sign_in_changes_cookie_and_keeps_cart(laptop: "BrowserContext") -> None:
    """Scripts do not see the cookie."""
    tab = opened(laptop)
    tab.get_by_label("Add Plums").click()
    expect(tab.locator(".pill")).to_have_text("1 item")
    before = cookie(laptop)
    sign_in(tab, "Ada")
    after = cookie(laptop)
    assert before["value"] != after["value"]
    assert (after["httpOnly"], after["sameSite"]) == (True, "Lax")
    assert tab.evaluate("document.cookie") == ""
    expect(tab.locator(".pill")).to_have_text("1 item")


def test_two_tabs_lose_no_item(laptop: "BrowserContext") -> None:
    """Eight additions at once from two tabs, and one more from each, are all in the cart."""
    tabs = [opened(laptop), opened(laptop)]
    sign_in(tabs[0], "Grace")
    for tab in tabs:
        tab.evaluate(ADD)
    assert [tab.evaluate(STATUSES) for tab in tabs] == [[200] * 4] * 2
    for tab in tabs:
        tab.get_by_label("Add Lemons").click()
    tabs[0].reload()
    expect(tabs[0].locator(".pill")).to_have_text("10 items")


def test_sign_out_everywhere_else(laptop: "BrowserContext", phone: "BrowserContext") -> None:
    """The other browser is signed out with its next click."""
    first, second = opened(laptop), opened(phone)
    for tab in (first, second):
        sign_in(tab, "Katherine")
    first.get_by_role("link", name="Devices").click()
    expect(first.locator(".device")).to_have_count(2)
    expect(first.locator(".device").first).to_contain_text("Safari on iPhone")
    first.get_by_role("button", name="Sign out everywhere else").click()
    expect(first.locator(".device")).to_have_count(1)
    expect(first.locator(".device")).to_contain_text("this device")

    second.get_by_role("link", name="Devices").click()
    expect(second).to_have_url(f"{second.url.rsplit('/', 1)[0]}/sign-in")
    assert phone.cookies() == []


def test_sign_out_of_one_device(laptop: "BrowserContext", phone: "BrowserContext") -> None:
    """Its button ends that session, and the cart goes with it."""
    first, second = opened(laptop), opened(phone)
    for tab in (first, second):
        sign_in(tab, "Mary")
        tab.get_by_label("Add Plums").click()
    first.get_by_role("link", name="Devices").click()
    first.get_by_role("main").get_by_role("button", name="Sign out", exact=True).click()
    expect(first.locator(".device")).to_have_count(1)
    second.get_by_role("link", name="Shop", exact=True).click()
    expect(second.locator(".pill")).to_have_text("0 items")
    expect(second.locator(".user")).to_have_count(0)


def test_session_survives_killed_replica(laptop: "BrowserContext", running: Shop) -> None:
    """Every page works with the replica that is left."""
    tab = opened(laptop)
    sign_in(tab, "Dorothy")
    os.kill(running.pids["replica A"], signal.SIGKILL)
    for number in range(1, 4):
        tab.get_by_label("Add Plums").click()
        expect(tab.locator(".pill")).to_have_text(f"{number} item{'s' * (number > 1)}")
        expect(tab.locator("#replica")).to_have_text("B")
    expect(tab.locator(".user")).to_have_text("Dorothy")

"""The studio keeps what you make, restores it, and can be used with the keyboard and a screen reader.

Chromium looks at a tiny random model. FLOWERDIFF_TEST_SHOTS=FOLDER keeps screenshots."""

import json
import re
import zipfile
from pathlib import Path
from urllib.parse import urlencode

import axe_playwright_python
import numpy as np
import pytest
from browser import (
    browser_fixture,  # noqa: F401
    browser_only,
    children,
    draw,
    fill,
    open_page,
    says,
    shot,
    studio_fixture,  # noqa: F401
)
from PIL import Image
from tiny import tiny_model

from flowerdiff.drawing.pictures import read_picture, resize_to_height

AXE = Path(axe_playwright_python.__file__).with_name('axe.min.js')
TABS = {
    'Studio': '.fd-gallery',
    'Compare': '.fd-generate:text("Generate both")',
    'Grid': '.fd-generate:text("Generate grid")',
    'Interpolate': '.fd-generate:text("Generate frames")',
    'Blind test': '.fd-votes',
    'Explore': '.fd-explore',
}  # what only that tab has


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kept') / 'meadow'
    tiny_model(folder / 'model', 32)
    return folder


@pytest.fixture(scope='module')
def page(browser, studio):
    page = open_page(browser, studio[1], permissions=['clipboard-read', 'clipboard-write'])
    page.get_by_text('Ready.').wait_for()
    return page


def kept(workspace):
    return sorted((workspace / 'work' / 'studio').glob('*.*[gp]'))


def tab(page, name):
    page.get_by_role('tab', name=name, exact=True).click()
    page.locator('[role=tab][aria-selected=true]').get_by_text(name, exact=True).wait_for()
    page.locator(TABS[name]).first.wait_for()


def card(page, i=0):
    return page.locator('.fd-gallery .fd-card').nth(i)


def reload(page):
    page.reload()
    page.get_by_text('Ready.').wait_for()


@browser_only
def test_pictures_and_fields_survive_a_reload(page, workspace):
    # a picture that is not written, a card without the settings of its file, a field that is not remembered
    says(page.locator('.fd-prompt textarea'), 'a red rose under a blue sky')  # the first prompt is an example
    page.get_by_role('button', name='Lock').click()
    page.get_by_label('Scheduler', exact=True).select_option(label='Euler')
    draw(page, 'a red rose', 5)
    sources = card(page).locator('.fd-image img').get_attribute('src')
    caption = card(page).locator('figcaption').inner_text()
    card(page).get_by_role('button', name='Favorite').click()
    card(page).locator('[aria-pressed=true]').get_by_text('★').wait_for()
    draw(page, 'an iris', 6)
    page.locator('.fd-prompt textarea').press_sequentially(' in the evening')  # the field keeps the focus
    state = workspace / 'work' / 'studio' / 'studio.json'
    page.wait_for_timeout(1500)
    assert json.loads(state.read_text())['fields']['prompt'] == 'an iris in the evening'
    reload(page)
    says(page.locator('.fd-prompt textarea'), 'an iris in the evening')
    says(page.get_by_label('Seed', exact=True), 6)
    says(page.get_by_label('Scheduler', exact=True), page.get_by_label('Scheduler').input_value())
    assert page.get_by_label('Scheduler', exact=True).evaluate('e => e.selectedOptions[0].text') == 'Euler'
    assert page.get_by_role('button', name='Lock').get_attribute('aria-pressed') == 'true'
    assert card(page, 1).locator('.fd-image img').get_attribute('src') == sources
    assert card(page, 1).locator('figcaption').inner_text() == caption
    page.get_by_role('button', name='Favorites', exact=True).click()
    page.wait_for_function('document.querySelectorAll(".fd-gallery .fd-card").length == 1')
    assert card(page).locator('.fd-image img').get_attribute('src') == sources
    page.get_by_role('button', name='Favorites', exact=True).click()
    page.get_by_label('Earlier prompts').or_(page.locator('.fd-request select')).first.select_option(
        'a red rose'
    )
    says(page.locator('.fd-prompt textarea'), 'a red rose')
    shot(page, 'kept')


@browser_only
def test_all_pictures_in_one_file_and_delete(page, workspace):
    page.get_by_role('button', name='Save all').click()
    with page.expect_download() as download:
        page.locator('.fd-zip').click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert sorted(names) == [path.name for path in kept(workspace)] and len(names) == 2
    card(page).get_by_role('button', name='Delete').click()
    card(page).get_by_role('button', name='Really delete').click()
    page.wait_for_function('document.querySelectorAll(".fd-gallery .fd-card").length == 1')
    assert [read_picture(path).prompt for path in kept(workspace)] == ['a red rose']


@browser_only
def test_ctrl_enter_draws_what_was_typed(page):
    # a click before the field is left draws the words of before
    n = page.locator('.fd-card').count()
    page.locator('.fd-prompt textarea').fill('a white daisy')
    page.keyboard.press('Control+Enter')
    page.locator('.fd-card').nth(n).wait_for()
    assert card(page).locator('figcaption').inner_text().startswith('a white daisy\n')
    page.get_by_text(re.compile('picture in')).wait_for()


@browser_only
def test_a_link_holds_the_settings(browser, studio, page):
    draw(page, 'a tulip & a rose', 9)
    card(page).get_by_text('Copy link').click()
    card(page).get_by_text('Copied').wait_for()
    link = page.evaluate('navigator.clipboard.readText()')
    other = open_page(browser, link)
    other.get_by_text('Ready.').wait_for()
    says(other.locator('.fd-prompt textarea'), 'a tulip & a rose')
    says(other.get_by_label('Seed', exact=True), 9)
    # values of an address that no page accepts, and one that is no text
    other.goto(f'{studio[1]}/?{urlencode(dict(prompt="<b>x", steps="1e9", scheduler="../..", seed="-1"))}')
    other.get_by_text('Ready.').wait_for()
    says(other.locator('.fd-prompt textarea'), '<b>x')
    other.context.close()


def drop(page, path, kind):
    data = list(Path(path).read_bytes())
    transfer = page.evaluate_handle(
        '([data, kind]) => { const t = new DataTransfer(); '
        "t.items.add(new File([new Uint8Array(data)], 'x', { type: kind })); return t; }",
        [data, kind],
    )
    page.dispatch_event('.fd-right', 'drop', dict(dataTransfer=transfer))


@browser_only
def test_a_dropped_picture_restores_its_settings(page, workspace, tmp_path):
    "Breaks when the settings of a file are lost, or a picture without settings is not started from."
    first = next(path for path in kept(workspace) if read_picture(path).prompt == 'a red rose')
    fill(page, 'Prompt', 'something else')
    drop(page, first, 'image/png')
    page.get_by_text('The settings of this picture are restored.').wait_for()
    says(page.locator('.fd-prompt textarea'), 'a red rose')
    says(page.get_by_label('Seed', exact=True), 5)
    again = draw(page)
    assert np.array_equal(np.array(again), np.array(Image.open(first)))  # not started from the picture
    plain = tmp_path / 'plain.jpg'
    Image.new('RGB', (80, 60), 'red').save(plain)
    with page.expect_file_chooser() as chooser:
        page.get_by_role('button', name='Open a picture').click()
    chooser.value.set_files(plain)
    page.get_by_text('The next pictures start from this one.').wait_for()
    draw(page)
    assert 'strength 0.6' in card(page).locator('small').first.inner_text()
    assert read_picture(kept(workspace)[-1]).strength == 0.6
    page.get_by_label('Start from this picture').uncheck()
    (tmp_path / 'text.png').write_text('no picture')
    drop(page, tmp_path / 'text.png', 'image/png')
    page.locator('.fd-status.bad').wait_for()


@browser_only
def test_variations_and_a_start_from_a_card(page, workspace):
    n = page.locator('.fd-card').count()
    card(page).get_by_role('button', name='Variations').click()
    page.locator('.fd-card').nth(n + 3).wait_for()
    page.get_by_text('4 pictures in').wait_for()
    made = [read_picture(path) for path in kept(workspace)[-4:]]
    assert {s.seed for s in made} == {5} and len({s.variation_seed for s in made}) == 4
    card(page).get_by_role('button', name='Start from it').click()
    page.get_by_text('The next pictures start from this one.').wait_for()
    page.get_by_label('Start from this picture').uncheck()


@browser_only
def test_a_grid(page, workspace):
    "Breaks when an axis changes another setting, rows and columns are swapped, or the sheet is not kept."
    tab(page, 'Grid')
    page.locator('.fd-prompt textarea').fill('a red rose')
    page.get_by_label('Columns: values').fill('2-4 (+2)')
    page.get_by_label('Rows', exact=True).select_option(label='Words of the prompt')
    says(page.get_by_label('Rows: values'), '')
    page.get_by_label('Rows: values').fill('tulip, iris')
    page.get_by_role('button', name='Generate grid').click()
    page.locator('.fd-status.bad').get_by_text("'tulip' is not in the prompt").wait_for()
    page.get_by_label('Rows: values').fill('red, white')
    page.get_by_role('button', name='Generate grid').click()
    page.locator('.fd-sheet').wait_for()
    shot(page, 'grid')
    *cells, sheet = kept(workspace)[-5:]
    made = [(s.prompt, s.num_inference_steps) for s in map(read_picture, cells)]
    assert made == [('a red rose', 2), ('a red rose', 4), ('a white rose', 2), ('a white rose', 4)]
    pixels, last = np.array(Image.open(sheet)), np.array(resize_to_height(Image.open(cells[-1]), 128))
    assert '-grid-' in sheet.name and np.array_equal(pixels[-128:, -128:], last)
    tab(page, 'Studio')
    assert card(page).locator('.fd-image img').evaluate('e => e.naturalHeight') == pixels.shape[0]


@browser_only
def test_an_interpolation(page, workspace):
    "Breaks when a link has another file than the folder, a card has no GIF, or Delete leaves a file."
    tab(page, 'Interpolate')
    page.locator('.fd-prompt textarea').first.fill('a red rose')
    page.get_by_label('To', exact=True).fill('a white daisy')
    page.get_by_label('To seed').fill('9')
    page.get_by_role('button', name='Generate frames').click()
    page.locator('.fd-sheet').wait_for()
    shot(page, 'interpolation')
    moving = kept(workspace)[-1]
    gif = moving.with_suffix('.gif')
    for link, path in zip(page.locator('.fd-sheet a').all(), (moving, gif)):
        with page.expect_download() as download:
            link.click()
        assert Path(download.value.path()).read_bytes() == path.read_bytes()
    assert Image.open(moving).n_frames == Image.open(gif).n_frames == 14
    assert read_picture(moving).prompt == 'a red rose'
    tab(page, 'Studio')
    with page.expect_download() as download:
        card(page).get_by_text('GIF', exact=True).click()
    assert Path(download.value.path()).read_bytes() == gif.read_bytes()
    card(page).get_by_role('button', name='Delete').click()
    card(page).get_by_role('button', name='Really delete').click()
    page.wait_for_function('document.querySelectorAll(".fd-gallery [download$=gif]").length == 0')
    assert not moving.exists() and not gif.exists()


def problems(page):
    page.evaluate(AXE.read_text())
    found = page.evaluate('axe.run().then(r => r.violations)')
    return [
        (v['id'], v['impact'], [n['html'][:150] for n in v['nodes']][:3])
        for v in found
        if v['impact'] in ('serious', 'critical')
    ]


@browser_only
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_nothing_serious(page, scheme):
    page.emulate_media(color_scheme=scheme)
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
        assert problems(page) == [], name
    page.emulate_media(color_scheme='light')


@browser_only
def test_names_focus_and_handles(page):
    # a slider without a name, an outline of no width, a handle that a finger misses
    tab(page, 'Studio')
    sliders = page.locator('.fd [role=slider]')
    assert {'Pictures', 'Steps', 'Guidance'} <= {e.get_attribute('aria-label') for e in sliders.all()}
    for e in sliders.all():
        if e.is_visible():
            box = e.bounding_box()
            assert box['width'] >= 24 and box['height'] >= 24
    for e in (sliders.first, page.locator('.fd-chip').first, page.locator('.fd select').first):
        page.keyboard.press('Tab')  # the focus is visible to a person with a keyboard
        e.focus()
        style = e.evaluate('e => { const s = getComputedStyle(e); return [s.outlineStyle, s.outlineWidth]; }')
        assert style[0] == 'solid' and int(style[1][0]) >= 2, style
    assert page.get_by_role('main').count() == page.get_by_role('banner').count() == 1


@browser_only
def test_enlarge_with_a_click_or_enter_and_not_with_the_focus(page):
    picture = card(page).locator('summary')
    small = card(page).locator('.fd-image img').bounding_box()['width']

    def width():
        return card(page).locator('.fd-image img').bounding_box()['width']

    picture.focus()
    assert width() == small
    page.keyboard.press('Enter')
    assert width() > 2 * small
    page.keyboard.press('Escape')
    assert width() == small
    picture.click()
    assert width() > 2 * small
    picture.press('Escape')


@browser_only
def test_a_kernel_that_is_gone_is_said_by_itself(page, studio):
    config = json.loads(page.locator('#jupyter-config-data').text_content())
    [kernel] = children(studio[0], config['kernelId'])
    kernel.kill()
    page.get_by_text('This page has ended').wait_for()  # without a click
    page.get_by_role('button', name='Open it again').click()
    page.get_by_text('Ready.').wait_for()
    assert page.locator('#fd-disconnected').count() == 0
    assert page.foreign == []

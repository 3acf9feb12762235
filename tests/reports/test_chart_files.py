"""Charts as files of their own."""

from xml.etree import ElementTree

from bezoar.reports import chart_files, charts
from bezoar.reports.page_parts import Figure, Section, Text


def test_every_chart_becomes_a_whole_svg_in_plain_colours(tmp_path):
    svg = charts.draw_histogram([charts.Series("a", [0.1, 0.2, 0.4])], "score")
    sections = [
        ("Ranking & more", Section([Text("words"), Figure(svg, "Scores of all")])),
        ("Nothing", Section([])),
        ("Again", Section([Figure(svg, "Scores of all")])),
    ]
    names = chart_files.write_charts(tmp_path, sections)
    assert names == ["01-ranking-more-scores-of-all.svg", "02-again-scores-of-all.svg"]
    text = (tmp_path / "charts" / names[0]).read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text and chart_files.light_colours()["clean"] in text


def test_the_light_theme_has_every_colour_of_charts():
    assert charts.COLOURS.keys() <= chart_files.light_colours().keys()


def test_a_page_without_charts_leaves_no_folder(tmp_path):
    assert chart_files.write_charts(tmp_path, [("A", Section([Text("words")]))]) == []
    assert not list(tmp_path.iterdir())

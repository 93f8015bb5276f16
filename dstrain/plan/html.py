"""The page of a plan as HTML: one file that needs nothing beside it, light or dark as the reader's system is.

Figures with their intervals, where a step goes, memory by rank, the schedule as a picture, and what all of it rests on.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from dstrain.plan.chart import PALETTE, STYLE, bar, memory_chart, schedule_chart
from dstrain.plan.report import Range, RankUse, Report, short
from dstrain.plan.simulation import Played

PAGE = """\
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b222c;--faint:#5c6675;--line:#dfe3e8;--idle:#e9ecef;
--good:#1f7a4a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e4e9f0;--faint:#a3adba;--line:#2d3642;
--idle:#2a323d;--good:#5fc48f;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Helvetica,Arial,
sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 12px}h2{font-size:17px;margin:0 0 12px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0}dt{color:var(--faint)}dd{margin:0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:12px;margin-top:16px}
.figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.figure b{display:block;white-space:nowrap;font-size:20px;font-weight:650;line-height:1.25}
.figure span,.faint{color:var(--faint)}
.figure .good{color:var(--good)}.figure .bad{color:var(--bad)}p{margin:8px 0 0}
svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0 0;padding:0;list-style:none}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:500;color:var(--faint)}
td,th{padding:4px 14px 4px 0;vertical-align:top;border-bottom:1px solid var(--line)}
ul{margin:0;padding-left:20px}footer{color:var(--faint);margin-top:20px}
"""
MADE_BY = "dstrain plan"
# Shares below this one are added up.
LEAST = 0.01


def render(report: Report, played: Played) -> str:
    """The whole file."""
    body = "\n".join(_sections(report, played))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{MADE_BY}"><title>{escape(report.title)}</title>'
        f"<style>{PAGE}{STYLE}</style>"
    )
    footer = f"<footer>Predicted by {MADE_BY}, not measured.</footer>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n{body}\n{footer}\n</main></body></html>\n'
    )


def _sections(page: Report, played: Played) -> Iterator[str]:
    yield f"<h1>{escape(page.title)}</h1>"
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in page.about.items())
    yield f"<dl>{about}</dl>"
    yield f'<div class="figures">{"".join(_figures(page))}</div>'
    yield _section("Where a step goes", _shares(page.parts_s, "of the slowest rank"))
    yield _section("What a device is busy with", _shares(page.kinds_s, "kernels, by kind"))
    yield _section("Memory of a device, by pipeline rank", _memory(page))
    yield _section("The schedule", _schedule(played))
    yield _section("Taken for granted", _list(page.assumptions))
    yield _section("What the machine's constants rest on", _evidence(page))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


# -- the headline -----------------------------------------------------------------------------------------------------


def _figures(page: Report) -> Iterator[str]:
    yield _figure("a step", page.step_s, "s")
    yield _figure("tokens a second and device", page.tokens_per_s_per_gpu)
    if page.mfu is not None:
        yield _card(f"{page.mfu:.1%}", "model FLOPs utilisation")
    yield _figure("the whole run", page.hours.through(lambda hours: hours / 24), "days")
    yield _figure("device-hours", page.gpu_hours)
    if page.cost is not None:
        yield _figure("US dollars", page.cost)
    most_gib = max(use.total_gib for use in page.memory)
    of = f" of {page.capacity_gib:,.1f}" if page.capacity_gib else ""
    word = {None: "", True: ' <span class="good">fits</span>', False: ' <span class="bad">does not fit</span>'}
    yield _card(f"{most_gib:,.1f} GiB", f"of memory{of}, on the fullest rank", word[page.verdict.fits])


def _figure(name: str, value: Range, unit: str = "") -> str:
    return _card(f"{short(value.value)} {unit}".rstrip(), name, f"<br>{short(value.low)} to {short(value.high)}")


def _card(value: str, name: str, after: str = "") -> str:
    return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}{after}</span></div>'


# -- shares and memory ------------------------------------------------------------------------------------------------


def _shares(parts: Mapping[str, float], of: str) -> str:
    """Seconds by name as a bar, with a legend that tells them."""
    total = sum(parts.values())
    shown = {name: seconds for name, seconds in parts.items() if seconds >= LEAST * total}
    rest = total - sum(shown.values())
    if rest > LEAST * total / 10:
        shown["the rest"] = rest
    texts = {name: f"{short(seconds)} s, {seconds / total:.1%}" for name, seconds in shown.items()}
    return bar(list(shown.values())) + _legend(shown, texts) + f'<p class="faint">{short(total)} s, {escape(of)}</p>'


def _legend(names: Sequence[str] | Mapping[str, float], texts: Mapping[str, str]) -> str:
    items = (
        f'<li><i style="background:{colour}"></i>{escape(name)} <span class="faint">{escape(texts.get(name, ""))}'
        "</span></li>"
        for name, colour in zip(names, PALETTE * (len(names) // len(PALETTE) + 1), strict=False)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _memory(page: Report) -> str:
    """Neighbours that need the same are one row."""
    names = [name for name in page.memory[0].parts_gib if any(use.parts_gib[name] > 0 for use in page.memory)]

    def parts(use: RankUse) -> tuple[float, ...]:
        return tuple(round(use.parts_gib[name], 2) for name in names)

    rows = []
    for gib, equal in groupby(page.memory, key=parts):
        ranks = [use.rank for use in equal]
        rows.append((f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}", gib))
    words = "".join(f"<p>{escape(line)}</p>" for line in page.verdict.lines)
    return memory_chart(rows, page.capacity_gib) + _legend(names, {}) + words


# -- schedule and sources ---------------------------------------------------------------------------------------------


def _schedule(played: Played) -> str:
    chart, legend = schedule_chart(played)
    items = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for name, style in legend)
    about = "Rows are pipeline ranks. Above in a row forward passes, below backward passes where both run at once."
    return f'<div class="wide">{chart}</div><ul class="legend">{items}</ul><p class="faint">{about}</p>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _evidence(page: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.kind)}</td><td>{escape(', '.join(each.of))}</td><td>{escape(each.source)}</td></tr>"
        for each in page.evidence
    )
    head = "<tr><th>kind</th><th>constants</th><th>source</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'

"""The look of the page, light and dark. Colours of lines are those of Okabe and Ito, safe for colour-blind readers."""

from __future__ import annotations

STYLE = """\
:root{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#1b2130;--soft:#5c6577;--rule:#e2e5eb;--grid:#eceef2;
--accent:#0072b2;--wash:#eef5fa;--orange:#c4520a;--band0:#0072b20a;--band1:#0072b217;--warn:#fff6e0;--warnline:#e6b84a}
@media(prefers-color-scheme:dark){:root{--ground:#12151b;--card:#1a1e27;--ink:#e8ebf1;--soft:#9aa4b6;--rule:#2c3240;--grid:#262b36;
--accent:#56b4e9;--wash:#1c2a38;--orange:#f0983c;--band0:#56b4e908;--band1:#56b4e916;--warn:#2d2614;--warnline:#8a6d22}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Liberation Sans",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:48px 24px 80px}
h1{font-size:clamp(1.7rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.1em 0 .35em;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 12px}
h3{font-size:1rem;margin:0 0 6px}
h4{font-size:.78rem;margin:0 0 6px;color:var(--soft);font-weight:600;display:flex;
justify-content:space-between;align-items:center}
section{margin-top:48px}
.eyebrow{margin:0;color:var(--accent);font-weight:600;font-size:.82rem;letter-spacing:.04em}
.lead{font-size:1.15rem;max-width:62ch;margin:0;color:var(--ink)}
.note,figcaption{color:var(--soft);font-size:.88rem;margin:0 0 12px;max-width:75ch}
figcaption{margin:8px 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px 18px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:.82rem}
.tile b{font-size:1.8rem;line-height:1.3;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile small{color:var(--soft);font-size:.84rem;font-variant-numeric:tabular-nums;min-height:1.4em}
.missing{background:var(--warn);border:1px solid var(--warnline);border-radius:12px;padding:14px 18px;margin-top:28px}
.missing ul{margin:0;padding-left:1.1em}
.scroll,.plot{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem;background:var(--card)}
.scroll{border:1px solid var(--rule);border-radius:12px;background:var(--card)}
th{font-size:.8rem;font-weight:600;color:var(--soft);text-align:right;padding:10px 16px;
border-bottom:1px solid var(--rule);white-space:nowrap}
td{padding:10px 16px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left}
tr.m-student td{background:var(--wash);font-weight:600}
section>.scroll+.note{margin-top:10px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:18px}
figure,article{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:18px 18px 16px;min-width:0}
.plot svg{display:block;width:100%;min-width:440px;height:auto}
.wide{grid-column:1/-1}.wide .plot svg{min-width:760px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.84rem;color:var(--soft);margin-bottom:6px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.key{width:22px;height:10px}
svg text{font-size:12.5px;fill:var(--soft);font-family:inherit;font-variant-numeric:tabular-nums}
svg text.name{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--soft);fill:none;stroke-opacity:.6}
.band.b0{fill:var(--band0)}.band.b1{fill:var(--band1)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:butt}
.dots{fill:none;stroke:var(--c);stroke-width:7;stroke-linecap:round}
.dots.soft{stroke-width:6;stroke-opacity:.62}
.bar{fill:var(--c)}
.key .line{stroke-width:3}
.key .s0,.key [class*=" s"]{stroke-width:9}
.c-total{--c:var(--ink)}.c-kd,.c-kd-2{--c:var(--orange)}.c-ce,.c-ce-2{--c:var(--accent)}
.line.c-kd{stroke-dasharray:7 3}.line.c-kd-2{stroke-dasharray:2 4}.line.c-ce-2{stroke-dasharray:2 4}
article{margin-top:14px;padding:0;overflow:hidden}
.asked{display:flex;gap:12px;padding:16px 18px 12px}
.count{flex:none;width:26px;height:26px;border-radius:50%;background:var(--wash);color:var(--accent);font-weight:700;font-size:.82rem;
display:grid;place-items:center}
pre{margin:0;font:inherit;font-size:.92rem;white-space:pre-wrap;overflow-wrap:anywhere}
pre.question{font-weight:600;font-size:1rem;max-height:12em;overflow:auto}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr));gap:1px;
background:var(--rule);border-top:1px solid var(--rule)}
.answer{background:var(--card);padding:12px 18px 14px;min-width:0}
.answer pre{max-height:15em;overflow:auto}
.answer pre+pre{margin-top:8px;padding-top:8px;border-top:1px solid var(--grid)}
.answer.m-student{background:var(--wash)}
.answer i{color:var(--soft)}
.score{background:var(--grid);color:var(--ink);border-radius:99px;padding:0 9px;font-variant-numeric:tabular-nums}
.times td:first-child{width:9em}.times td:last-child{width:9em}
.meter i{display:block;height:10px;min-width:2px;border-radius:5px;background:var(--accent)}
details{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:12px 18px;margin-top:10px}
summary{cursor:pointer;font-weight:600}
details pre{font:13px/1.5 ui-monospace,"Liberation Mono",Menlo,monospace;margin-top:12px;overflow-x:auto}
details table{margin-top:10px;width:auto}
code{font:13px ui-monospace,"Liberation Mono",Menlo,monospace}
.plain td{padding:3px 24px 3px 0;text-align:left;border:0}
@media(max-width:640px){main{padding:28px 14px 56px}section{margin-top:36px}}
@media print{body{background:#fff}figure,article,.tile{break-inside:avoid}.answer pre,pre.question{max-height:none}}
"""

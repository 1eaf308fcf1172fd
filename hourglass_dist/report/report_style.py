"""The look of a report: one column of cards on a phone, two on a screen, ink on paper."""

STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#22252b;--faint:#6d7380;--grid:#e8e6e0;
--c0:#2f6db3;--c1:#d9772b;--c2:#3c9a6b;--c3:#a04a97;--c4:#c23b4e;--c5:#7a6a2f;--c6:#2a9aa6;
--c7:#6b6f7a}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15171b;--card:#1d2026;--ink:#e6e6e3;
--faint:#9aa0ac;--grid:#2d3139;--c0:#6ea8e6;--c1:#f0a05e;--c2:#6cc79a;--c3:#d08ac8;--c4:#ea7f8d;
--c5:#c4b26a;--c6:#66c8d2;--c7:#a6abb6}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
section{margin:0 0 34px}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 12px;padding-bottom:6px;border-bottom:1px solid var(--grid)}
.state{margin:6px 0 20px;color:var(--faint)}
dl{display:grid;margin:0 0 24px;
grid-template-columns:repeat(auto-fit,minmax(min(190px,44%),1fr));gap:10px}
dl div,figure,article{background:var(--card);border:1px solid var(--grid);border-radius:8px}
dl div{padding:10px 12px}
dt{font-size:12px;color:var(--faint)}
dd{margin:2px 0 0;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums}
.hourglass p{display:grid;grid-template-columns:minmax(0,1fr) 240px;gap:3px 16px;margin:0 0 4px;
align-items:center;font-size:13px;color:var(--faint)}
.hourglass i{display:flex;justify-content:center}
.hourglass b{display:block;height:18px;min-width:4px;border-radius:4px}
@media (max-width:640px){.hourglass p{grid-template-columns:1fr;text-align:center;margin:0 0 8px}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px;break-inside:avoid}
figcaption{font-size:14px}
small{color:var(--faint);font-size:12px}
figure svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--faint);font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--faint);fill:none;opacity:.6}
.mark{stroke:var(--faint);stroke-dasharray:3 3;fill:none;opacity:.7}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.legend{margin:2px 0 4px;font-size:12px;color:var(--faint);display:flex;flex-wrap:wrap;gap:2px 14px;
min-height:18px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.legend b{color:var(--ink);font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--faint);font-weight:500;white-space:nowrap}
pre{font:12px/1.35 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:0}
article{padding:12px 14px;margin:0 0 10px;break-inside:avoid}
article p{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.settings pre{columns:340px 3;column-gap:28px;white-space:pre-wrap;overflow-wrap:anywhere}
@media screen and (max-width:640px){svg text{font-size:15px}}
@media print{body{background:#fff;font-size:11px}main{max-width:none;padding:0}
.charts{grid-template-columns:1fr 1fr}.wide{overflow:visible}pre{font-size:7.5px}
h2{break-after:avoid}}
"""

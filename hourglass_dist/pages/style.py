"""CSS of a page: one column on a phone, three on a screen; light, dark and print."""

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
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0}h3{font-size:14px;margin:18px 0 8px;overflow-wrap:anywhere}
h3:first-child{margin-top:0}
section,details{margin:0;padding:22px 0;border-top:1px solid var(--grid)}
section>div,details>div{margin-top:14px;scroll-margin-top:60px}
summary{cursor:pointer}summary h2{display:inline}
.state{margin:6px 0 20px;color:var(--faint);overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0;font-size:14px}
a{color:var(--c0)}
.top{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,1fr);gap:14px;margin:0 0 24px}
.top dl{align-content:start}
.score{font-size:13px;color:var(--faint);margin:0 0 12px}
.score b{display:block;font-size:52px;line-height:1.1;color:var(--c0);letter-spacing:-.02em}
dl{display:grid;margin:0;gap:10px;grid-template-columns:repeat(auto-fit,minmax(130px,1fr))}
dl div,figure,article{background:var(--card);border:1px solid var(--grid);border-radius:8px}
dl div{padding:7px 12px}
dt{font-size:12px;color:var(--faint)}
dd{margin:0;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
.hourglass{margin:18px 0 0}
.hourglass p{margin:0 0 8px;text-align:center;font-size:12px;color:var(--faint)}
.hourglass i{display:flex;justify-content:center}
.hourglass b{display:block;height:16px;min-width:4px;border-radius:4px}
.charts,.texts{display:grid;gap:14px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,max(330px,30%)),1fr))}
figure{margin:0;padding:12px 12px 6px;break-inside:avoid;min-width:0}
figcaption{font-size:14px}
small{color:var(--faint);font-size:12px}
figure svg{display:block;width:100%;height:auto}svg text{font-variant-numeric:tabular-nums}
.slim{display:none}
.legend{margin:2px 0 4px;font-size:12px;color:var(--faint);display:flex;flex-wrap:wrap;gap:2px 14px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.legend b{color:var(--ink);font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;margin:0 0 16px}
th,td{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top}
td{overflow-wrap:break-word}
th{color:var(--faint);font-weight:500}
.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
.bar{width:40vw;max-width:420px;min-width:60px;padding-right:0}
.bar i{display:block;height:14px;margin-top:3px;min-width:1px;border-radius:3px;
background:var(--c0)}
pre{font:12px/1.35 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:0}
article{padding:10px 14px;break-inside:avoid;min-width:0}
article p{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;
max-height:320px;overflow:auto}
@media screen and (max-width:760px){.top{grid-template-columns:minmax(0,1fr)}
.broad{display:none!important}.slim{display:block!important}main{padding:20px 14px 40px}
.score b{font-size:42px}th,td{padding-right:8px}
table{font-size:12px}.bar{min-width:40px;width:20vw}}
@media print{body{background:#fff;font-size:11px}main{max-width:none;padding:0}nav{display:none}
.charts,.texts{grid-template-columns:1fr 1fr}.top{grid-template-columns:1fr}
.wide{overflow:visible}pre{font-size:8px}.texts{grid-template-columns:1fr 1fr 1fr}
table{font-size:10px}article p{max-height:none;font-size:10px}h2,h3{break-after:avoid}
summary{list-style:none}details::details-content{content-visibility:visible;display:block;
height:auto}tr,dl div{break-inside:avoid}}
"""

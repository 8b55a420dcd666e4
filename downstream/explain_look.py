"""Style and script of the page of explain_page.py, which holds their hashes in its policy."""

CSS = """
:root{--page:#fff;--ink:#1a1d21;--soft:#5f6872;--line:#d5dae0;--panel:#f5f7f9;--heat:255 140 0;--mention:#1d4ed8;
  --bar:#5b7083;color-scheme:light}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e9ec;--soft:#98a2ad;--line:#343b43;
  --panel:#1d2226;--mention:#7fb0ff;--bar:#8fa5b8;color-scheme:dark}}
*{box-sizing:border-box}
html{scroll-padding:5rem}
body{margin:0;padding:0 44px 0 0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,nav,main,footer{max-width:62rem;margin:0 auto;padding:0 1.25rem}
h1{margin:1.25rem 0 .5rem;font-size:1.25rem;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0 0 1rem}
dt,caption,small,footer{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
table{width:100%;max-width:44rem;border-collapse:collapse}
caption{text-align:left;padding-bottom:.2rem}
th,td{padding:.15rem .75rem .15rem 0;text-align:left;font-weight:400;white-space:nowrap}
th{min-width:6.5rem;max-width:16rem;white-space:normal;overflow-wrap:anywhere}
.bar{width:45%}
td:nth-child(3){text-align:right}
td:nth-child(4){width:6.5rem}
svg{display:block;min-width:4rem}
rect{fill:var(--line)}
rect+rect{fill:var(--bar)}
.likely th,.likely td{font-weight:600}
.likely rect+rect{fill:var(--ink)}
p{margin:1rem 0 .5rem}
small{display:block;font-size:.875rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;font-size:.875rem}
.ramp{margin-right:.5em;border:1px solid var(--line);white-space:nowrap}
nav{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.4rem;align-items:center;padding-block:.5rem;
  background:var(--page);border-bottom:1px solid var(--line)}
nav[hidden]{display:none}
button{padding:.3rem .7rem;border:1px solid var(--line);border-radius:6px;background:var(--panel);color:inherit;
  font:inherit;font-size:.875rem;cursor:pointer}
button:hover{border-color:var(--soft)}
:focus-visible{outline:2px solid var(--mention);outline-offset:2px}
kbd{margin-left:.35em;color:var(--soft);font:inherit;font-size:.75rem}
output{font-size:.875rem;color:var(--soft)}
#note{margin:1rem 0;font:14.5px/1.75 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap;overflow-wrap:anywhere;tab-size:8}
.outside{color:var(--soft)}
.line-end::before{content:"\\21B5"}
mark{background:none;color:inherit;border-radius:3px;outline:2px solid var(--mention);outline-offset:1px}
@media screen{.here{border-radius:3px;outline:3px solid var(--ink);outline-offset:2px}}
footer{padding-block:1rem 2rem;border-top:1px solid var(--line);font-size:.875rem}
#strip{position:fixed;inset:0 0 0 auto;width:36px;border-left:1px solid var(--line);background:var(--panel);
  cursor:pointer;touch-action:none}
canvas{display:block;width:100%;height:100%}
#view{position:absolute;inset-inline:0;border:1px solid var(--soft);background:rgb(128 140 150/.18);pointer-events:none}
@media (max-width:40rem){body{padding-right:22px}#strip{width:20px}header,nav,main,footer{padding-inline:.75rem}
  kbd{display:none}button{padding-inline:.45rem;font-size:.8rem}.bar{width:auto}td:nth-child(4){display:none}output{flex-basis:100%}#note{font-size:13px}}
@media (forced-colors:active){#note,.legend{forced-color-adjust:none;background:var(--page);color:var(--ink)}}
@media print{body{padding:0}nav,#strip{display:none}header,main,footer{max-width:none;padding-inline:4px}
  *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

JS = """
"use strict";
const at = id => document.getElementById(id);
const note = at("note"), strip = at("strip"), canvas = strip.firstChild, view = at("view");
const mentions = [...note.querySelectorAll("mark")];
const shades = [...note.querySelectorAll("span[class^=a]")];
const places = shades.filter(span => span.dataset.place).sort((a, b) => a.dataset.place - b.dataset.place);
let here = null;

function go(element, said) {
  here?.classList.remove("here");
  here = element;
  here.classList.add("here");
  here.scrollIntoView({block: "center"});
  at("said").textContent = said;
}

function walk(list, said) { // its steps go round the list; a first step back goes to its end
  let now = -1;
  return step => {
    if (!list.length) return;
    now = now < 0 && step < 0 ? list.length - 1 : (now + step + list.length) % list.length;
    go(list[now], said(list[now], now));
  };
}

const mention = walk(mentions, element => element.title);
const place = walk(places, (element, n) => `place ${n + 1} of ${places.length}: ${element.title} of the attention`);
const doors = [["next", "n", () => mention(1), mentions], ["previous", "p", () => mention(-1), mentions],
               ["strongest", "s", () => place(1), places]];
for (const [id, , act, list] of doors) {
  at(id).addEventListener("click", act);
  at(id).hidden = !list.length;
}
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  doors.find(([, key]) => key === event.key.toLowerCase())?.[2]();
});

function look() { // which part of the note is on the screen
  const box = note.getBoundingClientRect(), scale = strip.clientHeight / box.height;
  const top = Math.max(0, -box.top), bottom = Math.min(box.height, innerHeight - box.top);
  view.style.top = `${top * scale}px`;
  view.style.height = `${Math.max(0, bottom - top) * scale}px`;
}

function draw() { // the note's shades, shrunken; of those that fall together the strongest
  const width = strip.clientWidth, height = strip.clientHeight, fine = devicePixelRatio || 1;
  const box = note.getBoundingClientRect(), scale = height / box.height;
  const tall = parseFloat(getComputedStyle(note).lineHeight) * scale;
  const rows = new Uint8Array(height + 2), colour = getComputedStyle(document.documentElement);
  canvas.width = width * fine;
  canvas.height = height * fine;
  const pen = canvas.getContext("2d");
  pen.scale(fine, fine);
  for (const span of shades) {
    const shade = parseInt(span.className.slice(1));
    for (const line of span.getClientRects()) {
      const first = Math.floor((line.top - box.top) * scale);
      const last = first + Math.max(2, tall);
      for (let row = first; row < last; row++) rows[row] = Math.max(rows[row], shade);
    }
  }
  rows.forEach((shade, row) => {
    pen.fillStyle = `rgb(${colour.getPropertyValue("--heat")} / ${shade / SHADES})`;
    pen.fillRect(width * .4, row, width * .6, 1);
  });
  pen.fillStyle = colour.getPropertyValue("--mention");
  for (const element of mentions) {
    const line = element.getBoundingClientRect();
    pen.fillRect(0, (line.top - box.top) * scale, width * .4 - 1, Math.max(3, line.height * scale));
  }
  look();
}

function jump(event) {
  const box = note.getBoundingClientRect();
  scrollTo(0, scrollY + box.top + event.clientY / strip.clientHeight * box.height - innerHeight / 2);
}
strip.addEventListener("pointerdown", event => { strip.setPointerCapture(event.pointerId); jump(event); });
strip.addEventListener("pointermove", event => { if (event.buttons) jump(event); });
addEventListener("scroll", look, {passive: true});
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme:dark)").addEventListener("change", draw);
at("next").parentElement.hidden = !mentions.length && !places.length;
strip.hidden = false;
new ResizeObserver(draw).observe(note);
"""

"use strict";
// Shows what /v1/events tells. All text goes in by textContent; the one piece of HTML, a start's
// figures, comes escaped from the API, is parsed without running, and only its <main> is taken.

const $ = (id) => document.getElementById(id);
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const POINTS = 60;

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) { bytes /= 1024; unit += 1; }
  return (unit ? bytes.toFixed(bytes < 10 ? 2 : 1) : Math.round(bytes)) + " " + UNITS[unit];
}

function count(number) {
  if (number >= 1e6) return (number / 1e6).toFixed(1) + " M";
  return Math.round(number).toLocaleString("en");
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0) + " ms";
  if (seconds < 120) return Math.round(seconds) + " s";
  if (seconds < 7200) return Math.round(seconds / 60) + " min";
  if (seconds < 172800) return Math.round(seconds / 3600) + " h";
  return Math.round(seconds / 86400) + " days";
}

function percent(part, whole) {
  if (!whole) return "–";
  const share = 100 * part / whole;
  return (share > 99.9 && share < 100 ? "99.9" : share.toFixed(share < 99 ? 0 : 1)) + " %";
}

function node(tag, kind, ...inside) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...inside.filter((x) => x !== null && x !== undefined && x !== ""));
  return made;
}

function bar(done, total) {
  const made = node("progress", done >= total ? "full" : "");
  made.max = Math.max(total, 1);
  made.value = Math.min(done, total);
  made.setAttribute("aria-label", percent(done, total));
  return made;
}

function table(id, heads, rows, empty) {
  const head = node("tr", "", ...heads.map(([text, kind]) => node("th", kind, text)));
  const body = rows.map((cells) => {
    const row = node("tr");
    cells.forEach((cell, place) => {
      const made = node("td", heads[place][1], ...(Array.isArray(cell) ? cell : [cell]));
      if (place && heads[place][0]) made.dataset.label = heads[place][0];
      row.append(made);
    });
    return row;
  });
  if (!rows.length) {
    const cell = node("td", "none", empty);
    cell.colSpan = heads.length;
    body.push(node("tr", "", cell));
  }
  $(id).replaceChildren(node("thead", "", head), node("tbody", "", ...body));
}

function named(text, below) {
  return [text, below ? node("small", "", below) : null];
}

function short(digest) {
  return digest.replace("sha256:", "").slice(0, 12);
}

// --- what is told

const told = {};
const line = { read: [], waited: [] };
let before = null;

function spark(values) {
  const most = Math.max(...values, 1e-9);
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 " + (POINTS - 1) + " 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  const from = POINTS - values.length;
  path.setAttribute("d", values.map((value, place) =>
    (place ? "L" : "M") + (from + place) + " " + (19 - 18 * value / most).toFixed(1)).join(""));
  path.setAttribute("vector-effect", "non-scaling-stroke");
  svg.append(path);
  return svg;
}

function tile(number, text, values) {
  return node("div", "tile", node("b", "", number), node("span", "", text),
    values && values.length > 1 ? spark(values) : null);
}

function showTiles() {
  const { exports, preloads, cache } = told;
  const tiles = [];
  if (cache) {
    const reads = cache.reads, now = performance.now() / 1000;
    const all = reads.hits + reads.misses;
    if (before && now - before.at > 0.5) {
      const spent = now - before.at;
      line.read.push(Math.max(0, all - before.all) / spent);
      line.waited.push(Math.max(0, reads.misses - before.misses) / spent);
      for (const values of Object.values(line)) values.splice(0, values.length - POINTS);
    }
    if (!before || now - before.at > 0.5) before = { at: now, all, misses: reads.misses };
    const rate = line.read.at(-1), waited = line.waited.at(-1);
    tiles.push(tile(percent(reads.hits, all), "of " + count(all) + " reads from memory"));
    tiles.push(tile(rate === undefined ? "–" : count(rate), "reads a second", line.read));
    tiles.push(tile(waited === undefined ? "–" : count(waited), "waits a second", line.waited));
    tiles.push(tile(size(reads.bytes_sent), "sent to " + reads.connections + " clients"));
    tiles.push(tile(count(cache.fetched.joins), "fetches saved by sharing"));
    tiles.push(tile(told.status ? told.status.exports : "–", "exports"));
    if (reads.errors) tiles.push(tile(count(reads.errors), "reads failed"));
  } else {
    const running = preloads ? preloads.preloads.filter((x) => x.state === "running").length : 0;
    tiles.push(tile(exports ? exports.exports.length : 0, "exports"));
    tiles.push(tile(running, "preloads running"));
  }
  $("tiles").replaceChildren(...tiles);
}

function showCache() {
  const cache = told.cache;
  $("cache").hidden = !cache;
  if (!cache) return;
  const arena = cache.arena;
  $("arena").replaceChildren(
    node("div", "row",
      node("span", "", size(arena.used_bytes) + " of " + size(arena.budget_bytes) + " in " +
        count(arena.chunks) + " chunks"),
      node("span", "soft", count(arena.evicted) + " evicted, " + count(arena.wasted_ahead) +
        " fetched in vain")),
    bar(arena.used_bytes, arena.budget_bytes),
    arena.degraded ? node("p", "bad", "Nothing is taken in: " + arena.degraded) : "",
    arena.quarantined ? node("p", "bad", count(arena.quarantined) +
      " chunks were found changed on this host's disk") : "");
  const reads = cache.reads;
  const rows = [[named("Memory", "chunks on this host"), count(reads.hits),
    size(reads.bytes_sent), "–", "–"]];
  for (const [name, text, below] of [["tier", "Shared cache", "an HTTP cache before the store"],
    ["origin", "Store", "the bucket or directory"]]) {
    const classes = Object.values(cache.sources[name]);
    const sum = (field) => classes.reduce((total, each) => total + each[field], 0);
    const requests = sum("requests");
    if (name === "tier" && !requests) continue;
    rows.push([named(text, below), count(requests), size(sum("bytes")),
      requests ? span(sum("seconds") / requests) : "–", count(sum("errors"))]);
  }
  table("tiers", [["Tier", "main"], ["Reads", "n"], ["Bytes", "n"], ["Mean time", "n"],
    ["Errors", "n"]], rows, "");
}

function showExports() {
  const { exports, left_out: more } = told.exports;
  $("exports-count").textContent = exports.length + more;
  const rows = exports.map((each) => {
    const fill = each.fill;
    const state = each.state === "failed" ? node("span", "state bad", "failed")
      : each.clients ? node("span", "state good", each.clients + " attached")
        : node("span", "state", "waiting");
    const filled = !fill ? "–" : fill.mode === "none" ? "on demand"
      : [bar(fill.chunks, fill.chunks_total),
        node("small", "", fill.mode + ", " + percent(fill.chunks, fill.chunks_total))];
    const button = node("button", "", "Start");
    button.type = "button";
    button.title = "Waterfall and disk map of this export's start";
    button.addEventListener("click", () => showStart(each.name));
    return [named(each.name, each.failure || each.reference), state, each.fs,
      size(each.size_bytes), filled, each.start ? button : ""];
  });
  table("exports", [["Export", "main"], ["State", ""], ["Face", ""], ["Disk", "n"],
    ["Here", ""], ["", "n"]], rows, "Nothing is exported: cubecache export IMAGE");
}

const KINDS = { running: "now", done: "good", failed: "bad", cancelled: "", paused: "warn" };

function showPreloads() {
  const { preloads, left_out: more } = told.preloads;
  $("preloads-count").textContent = preloads.length + more;
  const rows = preloads.map((job) => {
    const going = job.progress;
    let how = "–";
    if (job.state === "running" && going) {
      const steps = going.by_layer.filter((step) => step.total_bytes);
      const sum = (field) => steps.reduce((total, step) => total + step[field], 0);
      how = [bar(sum("done_bytes"), Math.max(1, sum("total_bytes"))), node("small", "",
        going.stage + (going.layer ? ", layer " + going.layer + " of " + going.layers : "") +
        (going.bytes_per_second ? ", " + size(going.bytes_per_second) + "/s" : "") +
        (going.seconds_left ? ", " + span(going.seconds_left) + " left" : ""))];
    } else if (job.error) {
      how = node("small", "bad", job.error.message);
    } else if (job.result) {
      how = node("small", "", size(job.result.stored_bytes) + " stored, " +
        size(job.result.downloaded_bytes) + " downloaded, " + span(job.result.seconds));
    }
    const ago = span(Math.max(0, Date.now() / 1000 - job.submitted)) + " ago";
    return [named(job.image, job.owner && "of " + job.owner),
      node("span", "state " + (KINDS[job.state] || ""), job.state), how, ago];
  });
  table("preloads", [["Image", "main"], ["State", ""], ["Progress", ""], ["Asked", "n"]], rows,
    "No jobs: cubecache preload IMAGE");
}

function showImages() {
  const { images, left_out: more } = told.images;
  $("images-count").textContent = images.length + more;
  const rows = images.map((each) => [
    named(each.names.join(", ") || "(no name)", short(each.image)), each.platform, each.fs,
    size(each.size_bytes), size(each.packed_bytes), count(each.chunks), each.layers]);
  table("images", [["Image", "main"], ["Platform", ""], ["Face", ""], ["Disk", "n"],
    ["Stored", "n"], ["Chunks", "n"], ["Layers", "n"]], rows, "The realm holds no image yet.");
}

const SHOW = {
  status(value) {
    $("where").textContent = value.host + " · realm " + value.realm +
      (value.owner ? " · owner " + value.owner : "") + " · " + value.store + " · up " +
      span(Date.now() / 1000 - value.started);
    document.title = value.host + " · cubecache";
    if (!value.ready) mark("off", "starting");
  },
  exports: showExports,
  preloads: showPreloads,
  images() { $("store-error").hidden = true; showImages(); },
  store(value) {
    $("store-error").hidden = !value.error;
    $("store-error").textContent = value.error || "";
  },
  cache() { showCache(); },
};

function tell(event, value) {
  told[event] = value;
  if (SHOW[event]) SHOW[event](value);
  if (event === "cache" || !told.cache) { showTiles(); showCache(); }
}

// --- a start

async function showStart(name) {
  const place = $("start");
  place.hidden = false;
  place.replaceChildren(node("p", "soft", "The start of " + name + " is being looked at…"));
  place.scrollIntoView({ block: "nearest" });
  const close = node("button", "", "Close");
  close.type = "button";
  close.addEventListener("click", () => { place.hidden = true; });
  try {
    const answer = await fetch("/v1/exports/" + encodeURIComponent(name) + "/start/page?part=figures",
      { headers: headers() });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    const parsed = new DOMParser().parseFromString(await answer.text(), "text/html");
    place.replaceChildren(node("div", "bar", close), ...parsed.querySelector("main").childNodes);
  } catch (error) {
    place.replaceChildren(node("div", "bar", close), node("p", "bad", error.message));
  }
}

// --- the stream

let token = "";

function headers() {
  return token ? { Authorization: "Bearer " + token } : {};
}

function mark(kind, text) {
  $("live").className = "pill " + kind;
  $("live").textContent = text;
}

async function watch() {
  const answer = await fetch("/v1/events", { headers: headers() });
  if (answer.status === 401) return ask(token ? "This token is not known." : "");
  if (!answer.ok) throw new Error((await answer.json()).detail);
  $("door").hidden = true;
  $("all").hidden = false;
  mark("on", "live");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return true;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = /^event: (\w+)\ndata: (.*)$/s.exec(part);
      if (found) tell(found[1], JSON.parse(found[2]));
    }
  }
}

function ask(why) {
  mark("off", "no token");
  $("all").hidden = true;
  $("door").hidden = false;
  $("refused").hidden = !why;
  $("refused").textContent = why;
  $("token").focus();
  return false;
}

async function run() {
  let pause = 1000;
  for (;;) {
    try {
      if (!await watch()) return;
      pause = 1000;
    } catch (error) {
      mark("off", "not reached");
      pause = Math.min(2 * pause, 30000);
    }
    await new Promise((done) => { setTimeout(done, pause); });
  }
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  sessionStorage.setItem("token", token);
  run();
});

// #token=… is for links of one's own: the part after # is never sent, and is gone at once.
const given = /^#token=([\w.~+/=-]{1,512})$/.exec(location.hash);
if (given) {
  sessionStorage.setItem("token", given[1]);
  history.replaceState(null, "", location.pathname);
}
token = sessionStorage.getItem("token") || "";
run();

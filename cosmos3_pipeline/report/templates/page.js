"use strict";
const byId = (id) => document.getElementById(id);

// The table: a click on a head sorts by its column, a second click reverses the order. Empty cells come last.
const table = byId("jobs");
table.querySelectorAll("th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  });
});

// Videos play in step: the first video leads, and a video more than half a frame away is set to its time.
const HALF_FRAME = 1 / 60;
const videos = [...document.querySelectorAll("video")];
const [play, time, at] = [byId("play"), byId("time"), byId("at")];
let playing = false;

function seek(seconds) {
  for (const video of videos) video.currentTime = Math.min(seconds, video.duration || seconds);
}

function show() {
  const seconds = videos[0].currentTime;
  time.value = seconds;
  at.textContent = `${seconds.toFixed(2)} s`;
}

function step() {
  if (!playing) return;
  const lead = videos[0];
  for (const video of videos.slice(1)) {
    const wanted = Math.min(lead.currentTime, video.duration || lead.currentTime);
    if (Math.abs(video.currentTime - wanted) > HALF_FRAME) video.currentTime = wanted;
  }
  show();
  drawDifference();
  if (lead.ended) stop(); else requestAnimationFrame(step);
}

function stop() {
  playing = false;
  play.textContent = "play";
  videos.forEach((video) => video.pause());
  seek(videos[0].currentTime);
}

if (videos.length) {
  const measure = () => { time.max = Math.max(...videos.map((video) => video.duration || 0)); };
  videos.forEach((video) => {
    video.addEventListener("loadedmetadata", measure);
    video.addEventListener("loadeddata", () => drawDifference());
    video.addEventListener("seeked", () => drawDifference());
  });
  measure();
  play.addEventListener("click", async () => {
    if (playing) return stop();
    if (videos[0].ended) seek(0);
    playing = true;
    play.textContent = "pause";
    await Promise.all(videos.map((video) => video.play()));
    step();
  });
  time.addEventListener("input", () => {
    if (playing) stop();
    seek(Number(time.value));
    at.textContent = `${Number(time.value).toFixed(2)} s`;
  });
}

// All pictures are enlarged by the same factor, around the place under the pointer.
const zoom = byId("zoom");
const root = document.documentElement.style;
if (zoom) {
  zoom.addEventListener("input", () => root.setProperty("--zoom", zoom.value));
  document.querySelectorAll(".frame").forEach((frame) => frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    root.setProperty("--x", `${100 * (event.clientX - box.left) / box.width}%`);
    root.setProperty("--y", `${100 * (event.clientY - box.top) / box.height}%`);
  }));
}

// The canvas computes the difference and a filter amplifies it, because a page from disk may not read pixels.
const [one, other, amplify, canvas] = [byId("one"), byId("other"), byId("amplify"), byId("difference")];

function drawDifference() {
  if (!canvas) return;
  const [a, b] = [one, other].map((pick) => document.querySelector(`figure[data-job="${pick.value}"] :is(video, img)`));
  const width = a.videoWidth || a.naturalWidth, height = a.videoHeight || a.naturalHeight;
  if (!width || !(b.videoWidth || b.naturalWidth)) return;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.style.filter = `brightness(${amplify.value})`;
  byId("times").textContent = amplify.value;
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "copy";
  context.drawImage(a, 0, 0, width, height);
  context.globalCompositeOperation = "difference";
  context.drawImage(b, 0, 0, width, height);
}

if (canvas) {
  for (const input of [one, other, amplify]) input.addEventListener("input", drawDifference);
  window.addEventListener("load", drawDifference);
}

// The differences between two jobs were written into the page.
const [from, to, diff] = [byId("from"), byId("to"), byId("diff")];
if (diff) {
  const known = JSON.parse(byId("diffs").textContent);
  const tell = () => {
    diff.textContent = known[`${from.value}-${to.value}`]
      ?? (from.value === to.value ? "the same job" : "not compared: one of them was not run, or neither is the baseline");
  };
  [from, to].forEach((pick) => pick.addEventListener("input", tell));
  tell();
}

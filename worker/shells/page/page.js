// Fetches this very page every two seconds and takes over what differs, so that there is one rendering, the server's,
// and focus, selection and scrolling stay where they are. When no fresh figures come, it says so, loudly.
"use strict";

(() => {
  const EVERY = 2000; // ms between two fetches
  const PATIENCE = 5000; // ms for one answer: a scrape of several processes, one of which hangs, takes 2 s
  const STALE = 8000; // ms without newer figures

  const button = document.getElementById("refreshing");
  const stale = document.getElementById("stale");
  const announced = document.getElementById("announced");
  let main = document.querySelector("main");
  let fresh = now(); // when figures last were newer than those before
  let told = main.dataset.key;
  let failure = "";
  let stopped = false;
  let timer = 0;
  let title = document.title;

  // Both clocks: one may stand still while the phone sleeps, the other may be set back.
  function now() {
    return { steady: performance.now(), wall: Date.now() };
  }

  function age() {
    const { steady, wall } = now();
    return Math.max(steady - fresh.steady, wall - fresh.wall);
  }

  // The tree `have` becomes what `want` is; nodes that stay the same are left alone.
  function become(have, want) {
    if (have.nodeName !== want.nodeName) {
      have.replaceWith(document.importNode(want, true));
    } else if (have.nodeType === Node.TEXT_NODE) {
      if (have.data !== want.data) have.data = want.data;
    } else {
      for (const name of have.getAttributeNames()) if (!want.hasAttribute(name)) have.removeAttribute(name);
      for (const { name, value } of want.attributes) if (have.getAttribute(name) !== value) have.setAttribute(name, value);
      while (have.childNodes.length > want.childNodes.length) have.lastChild.remove();
      want.childNodes.forEach((child, place) => {
        const mine = have.childNodes[place];
        if (mine) become(mine, child);
        else have.append(document.importNode(child, true));
      });
    }
  }

  async function fetched() {
    const answer = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error(`it answers HTTP ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const found = page.querySelector("main[data-at]");
    if (!found) throw new Error("something else answers at this address");
    return { found, title: page.title };
  }

  async function look() {
    try {
      const news = await fetched();
      failure = "";
      if (Number(news.found.dataset.at) > Number(main.dataset.at)) {
        fresh = now();
        if (stopped) return;
        become(main, news.found);
        title = news.title;
        tell();
      }
    } catch (error) {
      failure = error.name === "TimeoutError" ? "no answer in time" : error instanceof TypeError ? "nothing answers" : error.message;
    }
    judge();
  }

  // Aloud only when the condition changes: figures that move every two seconds are no news.
  function tell() {
    if (told === main.dataset.key) return;
    told = main.dataset.key;
    announced.textContent = main.querySelector("h2").textContent;
  }

  function judge() {
    const old = !stopped && age() > STALE;
    document.body.classList.toggle("old", old);
    document.title = old ? "✕ GONE · qris-expire-worker" : title;
    if (!old) {
      stale.hidden = true;
      return;
    }
    const since = main.querySelector("time").textContent;
    say(`No news from the worker since ${since}.`, `Why: ${failure || "its figures stand still"}. To do: look whether it ` +
      "has ended (pod or service, and its log), or the way to it is gone. All below is old.");
    stale.hidden = false;
  }

  function say(what, more) {
    if (stale.textContent === what + more) return; // an alert speaks whenever it changes
    const strong = document.createElement("strong");
    strong.textContent = what;
    stale.replaceChildren(strong, more);
  }

  function again() {
    clearTimeout(timer);
    if (stopped) return;
    timer = setTimeout(() => look().finally(again), EVERY);
  }

  button.addEventListener("click", () => {
    stopped = !stopped;
    button.textContent = stopped ? `Stopped at ${main.querySelector("time").textContent}: refresh again` : "Stop refreshing";
    fresh = now();
    judge();
    if (stopped) again();
    else look().finally(again);
  });

  // A phone that was asleep shows what was: it says so, and what is comes at once.
  function wake() {
    if (document.hidden || stopped) return;
    judge();
    look().finally(again);
  }

  document.addEventListener("visibilitychange", wake);
  window.addEventListener("online", wake);
  setInterval(judge, 1000);
  button.hidden = false;
  again();
})();

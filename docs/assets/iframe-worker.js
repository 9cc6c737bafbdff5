// Browsers run no workers on file:// pages, and the search is a worker. There, a hidden frame runs the worker's script in its place.
"use strict";
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe"), home = new URL(url, location.href);
      frame.hidden = true;
      document.body.append(frame);
      const inside = this.inside = frame.contentWindow;
      const load = src => new Promise((done, failed) => {
        const script = frame.contentDocument.createElement("script");
        Object.assign(script, { src, onload: done, onerror: failed });
        frame.contentDocument.body.append(script);
      });
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...urls) => Promise.all(urls.map(one => load(new URL(one, home))));
      this.ready = load(home);
    }
    postMessage(data) { this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data }))); }
    terminate() { this.inside.frameElement.remove(); }
  };
}

"use strict";
// JupyterLab shows an image without alternative text. This renderer takes it from the output's
// text/plain, where a figure of the course says in words what it shows.
//
// A federated extension as JupyterLab loads it: `init` gets the libraries it shares, `get` hands out the
// module that package.json names.
(() => {
  let libraries;

  async function shared(name) {
    const [newest] = Object.values(libraries[name]).reverse();
    return (await newest.get())();
  }

  function renderer(Widget, mimeType, source) {
    return class extends Widget {
      async renderModel(model) {
        const image = document.createElement("img");
        image.src = source(model.data[mimeType]);
        image.alt = [model.data["text/plain"] ?? ""].flat().join("").trim();
        this.node.replaceChildren(image);
        this.node.classList.add("jp-RenderedImage");
        await image.decode().catch(() => {});
      }
    };
  }

  function extension(Widget, mimeType, source) {
    const Renderer = renderer(Widget, mimeType, source);
    return {
      id: `course-figures:${mimeType}`,
      // Before JupyterLab's own, whose ranks are 80 and 90, and after HTML.
      rank: 70,
      dataType: "string",
      rendererFactory: {
        // An image runs no script, so an untrusted notebook may show it too.
        safe: true,
        mimeTypes: [mimeType],
        createRenderer: () => new Renderer(),
      },
    };
  }

  async function module() {
    const { Widget } = await shared("@lumino/widgets");
    const extensions = [
      extension(Widget, "image/svg+xml", (svg) => "data:image/svg+xml," + encodeURIComponent([svg].flat().join(""))),
      extension(Widget, "image/png", (png) => "data:image/png;base64," + png),
    ];
    return () => ({ __esModule: true, default: extensions });
  }

  window._JUPYTERLAB = window._JUPYTERLAB ?? {};
  window._JUPYTERLAB["course-figures"] = {
    init: (scope) => { libraries = scope; },
    get: module,
  };
})();

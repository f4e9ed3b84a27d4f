"use strict";
Reveal.initialize({
  hash: true,
  width: 1280,
  height: 760,
  margin: 0.03,
  center: false,
  transition: "none",
  slideNumber: "c/t",
  plugins: [RevealNotes],
});

// Runs before the first paint, so that a chosen theme does not flash in the other's colours.
try {
  const theme = localStorage.getItem("refrain.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage is forbidden: the system's theme it is.
}

"""Readability of a page, measured in a browser."""

CONTRASTS = """
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const painted = colours => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    const under = [];
    for (let above = element; above; above = above.parentElement) under.unshift(getComputedStyle(above).backgroundColor);
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [painted(['white', ...under]), painted(['white', ...under, colour])];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), texts.currentNode.data.trim()]);
  }
  return found;
}
"""


def lowest_contrast(page) -> float:
    """The lowest contrast of visible text with its background, as defined by the WCAG, which require 4.5."""
    ratio, text = min(page.evaluate(CONTRASTS))
    print(f"the lowest contrast, {ratio:.2f}, is of {text!r}")
    return ratio

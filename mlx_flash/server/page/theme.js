// The theme: light, dark, or the system's. A classic script in the head, so that the page never shows the wrong one.
(() => {
  const KEY = "mlx_flash.theme";
  const CHOICES = ["auto", "light", "dark"];

  const stored = () => {
    try {
      const choice = localStorage.getItem(KEY);
      return CHOICES.includes(choice) ? choice : "auto";
    } catch {
      return "auto"; // Storage is disabled.
    }
  };

  const apply = (choice) => {
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
  };

  apply(stored());

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const changed = () => document.dispatchEvent(new Event("themechange"));
    let choice = stored();
    button.textContent = `Theme: ${choice}`;
    button.addEventListener("click", () => {
      choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // Storage is disabled: the theme lasts as long as the page.
      }
      apply(choice);
      button.textContent = `Theme: ${choice}`;
      changed();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  });
})();

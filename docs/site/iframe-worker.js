// Browsers start no worker for a page that was opened from the file system: the search runs in a frame there.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      const start = ready => {
        const { contentWindow: scope, contentDocument: page } = frame
        scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = page.createElement("script")
        script.src = url
        script.addEventListener("load", () => ready(scope))
        page.documentElement.append(script)
      }
      this.scope = new Promise(ready => frame.addEventListener("load", () => start(ready), { once: true }))
      document.documentElement.append(frame)
    }
    async postMessage(data) {
      const scope = await this.scope
      scope.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
